"""Weights of the original implementation (timoneh/hflow): its parameter names in terms of ours."""

from __future__ import annotations

import re
from typing import Mapping

import torch
from torch import Tensor, nn

from ...errors import CheckpointError

__all__ = ["check_original", "load_original", "original_names"]

# Constants that the original keeps in its state dict and we derive from the configuration.
_DERIVED = re.compile(r"(.*\.)?(mask_in|mask_out|interp_K|interp_K_down|_mask_for_base|_mask_for_style)")

_UNET = {"start": "start", "bottom": "bottom", "end.0": "end_a", "end.1": "end_b",
         r"(down|up)\.(\d+)\.0": r"\1.\2", r"(down|up)\.(\d+)\.1": r"\1_b.\2"}
_HALVING = {"first": "conv_e1", "second": "conv_e2"}
_PLAIN_NET = {"context": "cond_preproc_a", r"hidden\.0": "conv_1", r"hidden\.1": "conv_2", r"hidden\.2": "conv_3",
              "scale": "conv_out_scale", r"shift\.0": "conv_out_bias", r"shift\.1": "conv_out_bias_b"}
_POOLING_NET = {"context": "conv_cond_connect_pre", "input": "conv_cond_connect_un", r"before\.0": "conv_1",
                r"before\.1": "conv_2", "after": "conv_3", "bottom": "bottom",
                r"(down|up)\.(\d+)\.first": r"\1.\2", r"(down|up)\.(\d+)\.second": r"\1_b.\2",
                r"(down|up)\.(\d+)\.merge": r"\1_c.\2",
                r"scale\.0": "conv_scale_out", r"scale\.1": "conv_scale_out_b",
                r"shift\.0": "conv_bias_out", r"shift\.1": "conv_bias_out_b"}
_STYLE = {r"layers\.0": "fc1"} | {rf"layers\.{index + 1}": f"fc_rest.{index}" for index in range(5)}
_CODE_ENCODER = {r"to_2x2\.first": "0.conv_e1", r"to_2x2\.second": "0.conv_e2", "between": "0.conv_e3",
                 r"to_1x1\.first": "1.conv_e1", r"to_1x1\.second": "1.conv_e2", "code": "1.conv_e3_b"}
_DOUBLING = {"input": "conv_d1", r"residual\.0": "conv_d2", r"residual\.1": "conv_d3", r"residual\.2": "conv_d4",
             r"styles\.0": "A_1_s", r"styles\.1": "A_2_s"}
_REFINEMENT = {"first": "conv_d_pred_1", "second": "conv_d_pred_2", "last": "conv_d_pred_3"}
_START = {"shift": "conv_d5_a", r"scale\.0": "conv_d5_b", r"scale\.1": "conv_d5_bb"}
_END = {"shift": "conv_d5_c", r"scale\.0": "conv_d5_d", r"scale\.1": "conv_d5_dd"}


def original_names(model: nn.Module) -> dict[str, str | list[str]]:
    """For each parameter of an :class:`~.model.HFlow`: the original's name, or a list of names where ours is a stack."""
    return {name: _original_name(model, name) for name, _ in model.named_parameters()}


def check_original(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Checks that the original's weights fit an :class:`~.model.HFlow`, which may be on the meta device.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    sources = _sources(model)
    expected = {source for group in sources.values() for source in group}
    given = {name for name in state_dict if not _DERIVED.fullmatch(name)}
    if given != expected:
        raise CheckpointError("The weights do not belong to this configuration: "
                              f"{_some(expected - given, 'missing')}; {_some(given - expected, 'not in the model')}.")
    for name, parameter in model.named_parameters():
        group = sources[name]
        shape = parameter.shape if len(group) == 1 else parameter.shape[1:]
        for source in group:
            if _without_ones(state_dict[source].shape) != _without_ones(shape):
                raise CheckpointError(f"{source}: shape {tuple(state_dict[source].shape)} does not fit this "
                                      f"configuration ({name} holds {tuple(parameter.shape)}).")


@torch.no_grad()
def load_original(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the original's weights into an :class:`~.model.HFlow` and marks its actnorms as initialised.

    Raises:
        CheckpointError: as :func:`check_original`; the model is unchanged.
    """
    check_original(model, state_dict)
    sources = _sources(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.stack([state_dict[source] for source in sources[name]]).reshape(parameter.shape))
    for level in model.levels:
        level.flow.affines.finish_initialization()


def _sources(model: nn.Module) -> dict[str, list[str]]:
    return {name: [source] if isinstance(source, str) else source for name, source in original_names(model).items()}


def _without_ones(shape: torch.Size) -> list[int]:
    """A shape without the dimensions that the original has beside ours, such as (1, C, 1, 1) for C channels."""
    return [length for length in shape if length != 1]


def _some(names: set[str], what: str) -> str:
    shown = sorted(names)[:3]
    return f"{len(names)} {what}" + (f" ({', '.join(shown)}{', …' if len(names) > 3 else ''})" if names else "")


def _original_name(model: nn.Module, name: str) -> str | list[str]:
    path, _, kind = name.rpartition(".")
    suffix = {"weight": ".w", "bias": ".b"}.get(kind, "")
    head, _, rest = path.partition(".")
    if head == "code_projection":
        return f"endblock_split_conv{suffix}"
    if head == "code_decoder":
        return "endblock_autoencoder.components.0.conv_d_const"
    if head == "code_encoder":
        return f"endblock_autoencoder.components.{_translate(rest, _CODE_ENCODER)}{suffix}"
    if head == "style":
        return f"global_state.{_translate(rest, _STYLE)}{suffix}"
    part, _, rest = rest.partition(".")
    index, _, rest = rest.partition(".")
    if head == "endblock":
        if part == "contexts":
            return f"endblock_unified.cond_encoders.{index}{suffix}"
        flow = "endblock_uncond" if index == "0" else f"conditionals.{int(index) - 1}"
        return _flow_name(model.endblock.flows[int(index)], f"endblock_unified.{flow}", rest, kind)
    return _level_name(model.levels[int(part)], f"blocks.{part}", f"{index}.{rest}".rstrip("."), kind)


def _level_name(level: nn.Module, prefix: str, path: str, kind: str) -> str | list[str]:
    suffix = ".w" if kind == "weight" else ".b"
    head, _, rest = path.partition(".")
    if head == "flow":
        return _flow_name(level.flow, f"{prefix}.blocks", rest, kind)
    if head in ("context", "skip"):
        return f"{prefix}.{'learned_upscaler_cond' if head == 'context' else 'skip_to_next'}{suffix}"
    lowest = len(level.encoder.halvings) - 1
    component = _encoder_name(rest, lowest) if head == "encoder" else _decoder_name(rest, lowest)
    return f"{prefix}.learned_upscaler.components.{component}{suffix}"


def _encoder_name(path: str, lowest: int) -> str:
    head, _, rest = path.partition(".")
    if head == "halvings":
        index, _, rest = rest.partition(".")
        return f"{index}.{_HALVING[rest]}"
    return {"between": "0.conv_e3", "target": f"{lowest}.conv_e3", "features": f"{lowest}.conv_e3_b"}[head]


def _decoder_name(path: str, lowest: int) -> str:
    head, _, rest = path.partition(".")
    if head == "blocks":
        index, _, rest = rest.partition(".")
        return f"{lowest - int(index)}.{_translate(rest, _DOUBLING)}"
    part, _, inner = rest.partition(".")
    if head == "refine":
        return f"{lowest}." + (f"conv_d_pred_0.{_translate(inner, _UNET)}" if part == "unet" else _REFINEMENT[part])
    if part == "unet":
        return f"0.{'conv_d5_un' if head == 'start' else 'conv_d5_c_un'}.{_translate(inner, _UNET)}"
    return f"0.{_translate(rest, _START if head == 'start' else _END)}"


def _flow_name(flow: nn.Module, prefix: str, path: str, kind: str) -> str | list[str]:
    steps = len(flow.networks)
    head, _, rest = path.partition(".")
    if head == "affines":
        inner = {"log_scale": "actnorm.an_scale", "bias": "actnorm.an_bias",
                 "matrix": "invconv._U" if flow.affines.parametrization == "orthogonal" else "invconv.K"}[kind]
        return [f"{prefix}.steps.{step}.{inner}" for step in reversed(range(steps))]
    index, _, rest = rest.partition(".")
    network = flow.networks[int(index)]
    if hasattr(network, "before"):
        translated = _translate(rest, _POOLING_NET)
    elif rest == "input":
        translated = "conv_cond_connect" if hasattr(network, "context") else "conv_0"
    else:
        translated = _translate(rest, _PLAIN_NET)
    suffix = ".w" if kind == "weight" else ".b"
    return f"{prefix}.steps.{steps - 1 - int(index)}.coupling.{translated}{suffix}"


def _translate(path: str, table: Mapping[str, str]) -> str:
    for pattern, replacement in table.items():
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(replacement)
    raise KeyError(path)
