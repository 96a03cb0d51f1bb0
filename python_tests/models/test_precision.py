"""Networks in bfloat16: what stays float32 or better, how far results move, and that inverses remain exact."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hflow_fast.models import HFlow
from hflow_fast.models import precision
from hflow_fast.models.hflow.effective import _layers
from hflow_fast.models.hflow.layers import EqualConv2d, EqualLinear, Equalized

from .test_prepared import train

STEPS = 256
"""A pixel's range, in steps of 8 bits."""


class Tensors(TorchDispatchMode):
    """Shows each operation's name and its tensors, arguments and results."""

    def __init__(self, look) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        self.look(function.overloadpacket.__name__, tensors)
        return result


def round_trip(model: HFlow, images: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error of decoded images in steps of 8 bits, their latents rounded to ``dtype`` if there is one."""
    latents, _ = model.encode(images)
    decoded, _ = model.decode([latent.to(dtype) if dtype else latent for latent in latents])
    return float((decoded - images).abs().max()) * STEPS


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
def test_inverse_is_exact_in_bf16(tiny_model, channels_last):
    """Which float32 latents do not give: then the networks do not see the same values again."""
    tiny_model.eval()
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5
    exact = round_trip(tiny_model, images)
    tiny_model.set_precision("bf16", channels_last=channels_last)
    latents, log_det = tiny_model.encode(images)
    assert {latent.dtype for latent in latents} == {log_det.dtype} == {torch.float64}
    decoded, inverse_log_det = tiny_model.decode(latents)
    assert decoded.dtype == torch.float32
    assert round_trip(tiny_model, images) <= 1e-4
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-12, atol=1e-9)
    assert round_trip(tiny_model, images, torch.float32) > 100 * max(exact, 1e-4)


@torch.no_grad()
def test_bf16_moves_the_bound_little_and_really_is_used(tiny_model, images):
    tiny_model.eval()
    bits = {name: tiny_model.set_precision(name).bound(images, noise=False).bits_per_dim().mean()
            for name in ("fp32", "tf32", "bf16")}
    assert bits["tf32"] == bits["fp32"]  # on a CPU
    assert 1e-6 < abs(bits["bf16"] - bits["fp32"]) < 0.1
    assert tiny_model.set_precision("fp32").bound(images, noise=False).bits_per_dim().mean() == bits["fp32"]


def test_what_stays_float32(tiny_model, images, monkeypatch):
    """Networks alone are bfloat16, but for encoders and what gives scales and shifts: no flow variable, channel map,
    log-det or gradient is."""
    monkeypatch.setattr(precision, "HAS_BFLOAT16", True)  # no detour through float32
    tiny_model.set_precision("bf16")
    seen: dict[str, Counter] = {}

    def look(name: str, tensors: list[Tensor]) -> None:
        seen.setdefault(name, Counter())[tuple(tensor.dtype for tensor in tensors)] += 1

    with Tensors(look), tiny_model.prepared():
        loss = tiny_model.loss(images)
        loss.mean().backward()
    half, single = torch.bfloat16, torch.float32
    fine = [name for name, module in tiny_model.named_modules() if isinstance(module, Equalized)
            and re.search(r"encoder|decoder\.(start|end)\.|\.(scale|(scale|shift)\.1)$", name)]
    assert fine == [name for name, module in tiny_model.named_modules() if getattr(module, "fine", False)]
    fine_users = [user for user in tiny_model._weights._users if _layers(user)[0].fine]
    for name, kind in (("addmm", EqualLinear), ("convolution", EqualConv2d), ("convolution_backward", EqualConv2d)):
        of_dtype = Counter()
        for dtypes, count in seen[name].items():
            of_dtype[frozenset(dtypes)] += count
        assert of_dtype.keys() == {frozenset({single}), frozenset({half})}
        assert of_dtype[frozenset({single})] == sum(isinstance(_layers(user)[0], kind) for user in fine_users) > 10
    assert seen["flow_step_fwd"].keys() == {(single,) * 6}  # x, raw, weight, bias → y, log-det
    assert seen["coupling_fwd"].keys() == {(single,) * 4}  # x, raw → y, log-det
    for name in ("lu_many_fwd", "bmm", "std", "log"):
        assert not any(half in dtypes for dtypes in seen[name]), name
    assert loss.dtype == single
    assert all(parameter.dtype == parameter.grad.dtype == single for parameter in tiny_model.parameters())


@torch.no_grad()
def test_targets_are_those_of_float32(tiny_model, images):
    expected = tiny_model.set_precision("fp32", channels_last=True).targets(images)
    for target, exact in zip(tiny_model.set_precision("bf16").targets(images), expected, strict=True):
        assert torch.equal(target, exact)


def test_gradients_of_a_group_gather_in_float32(tiny_model, images):
    """With prepared(), and without it, they are those of float32 networks but for bfloat16's noise."""
    _, exact = train(tiny_model, images, prepared=False)
    tiny_model.set_precision("bf16")
    losses, plain = train(tiny_model, images, prepared=False)
    prepared_losses, prepared = train(tiny_model, images, prepared=True)
    assert all(map(torch.equal, losses, prepared_losses))
    everything = [torch.cat([gradients[name].flatten() for name in exact]) for gradients in (exact, plain, prepared)]
    assert torch.cosine_similarity(*everything[:2], dim=0) > 0.95
    difference = (everything[1] - everything[2]).norm() / everything[1].norm()
    assert difference < 3e-3, difference
    with tiny_model.prepared():
        tiny_model.loss(images).mean().backward()
        tiny_model._weights.collect()
        assert {total.dtype for total in tiny_model._weights._sums if total is not None} == {torch.float32}


def test_without_instructions_bf16_rounds_where_it_would(tiny_model, images, monkeypatch):
    tiny_model.eval().set_precision("bf16")
    losses = []
    for has in (False, True):
        monkeypatch.setattr(precision, "HAS_BFLOAT16", has)
        losses.append(tiny_model.loss(images, noise=False))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_channels_last_is_the_same_function(tiny_model, images):
    tiny_model.double()
    results = []
    for channels_last in (False, True):
        tiny_model.set_precision("fp32", channels_last=channels_last).zero_grad()
        with tiny_model.prepared():
            loss = tiny_model.loss(images.double(), noise=False)
            loss.mean().backward()
        results.append((loss.detach(), {name: p.grad for name, p in tiny_model.named_parameters()}))
    (loss, gradients), (last_loss, last_gradients) = results
    torch.testing.assert_close(last_loss, loss, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        last = last_gradients[name]
        assert gradient.dim() != 4 or last.is_contiguous(memory_format=torch.channels_last), name
        tolerance = 1e-12 * (1 + gradient.abs().max().item())
        torch.testing.assert_close(last_gradients[name], gradient, rtol=0, atol=tolerance)


def test_channels_last_stays(tiny_model, images):
    """No feature is turned round but at the door: not for an operation, not by one, not on the way back."""
    tiny_model.set_precision("fp32", channels_last=True)
    turned: list[str] = []

    def look(name: str, tensors: list[Tensor]) -> None:
        planes = [tensor for tensor in tensors if tensor.dim() == 4 and tensor.shape[1] > 1
                  and tensor.shape[2:].numel() > 1 and 0 not in tensor.stride()]
        formats = {tensor.stride(1) == 1 for tensor in planes}
        if name in ("clone", "_to_copy", "copy_") or name.startswith("convolution"):
            turned.extend([name] if len(formats) == 2 else [])
        elif name.startswith(("flow_step", "coupling", "conv1x1", "resample", "instance_norm", "bias_act", "leaky_relu",
                              "cat", "avg_pool2d", "tanh")):
            assert formats <= {True}, (name, [tensor.stride() for tensor in planes])

    with tiny_model.prepared(), Tensors(look):
        loss = tiny_model.loss(images).mean()
        forward = len(turned)
        loss.backward()
    # In: the images, the decoder's first canvas, and flat views for sums over all values of an image or a target. Back:
    # the context's gradient, a sum over networks, once per level.
    assert forward <= 6 and len(turned) - forward <= 3, turned


def test_precision_is_the_model_s_and_not_saved(tiny_model, images):
    tiny_model.set_precision("bf16")
    other = copy.deepcopy(tiny_model)
    assert other.precision == "bf16"
    other.set_precision("fp32")
    assert tiny_model.precision == "bf16"
    tiny_model.eval(), other.eval()
    assert not torch.equal(tiny_model.loss(images, noise=False), other.loss(images, noise=False))
    other.load_state_dict(tiny_model.state_dict())
    assert other.precision == "fp32"
    with pytest.raises(ValueError, match="'fp16' is none of fp32, tf32, bf16"):
        tiny_model.set_precision("fp16")


def test_tf32_is_a_matter_of_convolutions_alone(tiny_model):
    before = torch.backends.cudnn.allow_tf32
    try:
        assert not tiny_model.set_precision("fp32") is None and not torch.backends.cudnn.allow_tf32
        tiny_model.set_precision("tf32")
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
