"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

import click

if TYPE_CHECKING:
    from torch import nn

__all__ = ["batch_size_option", "chosen_label", "class_names", "device_option", "ema_option", "label_option",
           "new_file", "pixel_bits", "precision_option", "sampling_std", "seed_option", "std_option", "threads_option"]


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    import torch

    from ..training.distributed import own_device

    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        value = own_device(value)
        torch.empty(0, device=value)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{value!r} cannot be used here ({reason})") from None
    return value


def _threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    import torch

    if value is not None:
        torch.set_num_threads(value)


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--device``, given to the command as a usable device."""
    return click.option("--device", default="auto", callback=_device,
                        help="cpu, cuda, cuda:1 …; auto takes the GPU if there is one. "
                        "Under torchrun, cuda is a GPU for each process.")(command)


def precision_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--precision``, given to the command as "fp32", "tf32", "bf16" or None, which is the device's."""
    return click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]), help="Arithmetic of the networks; "
                        "flows compute in float32 or better.  [default: tf32 on a GPU, else fp32]")(command)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--threads``, which takes effect at once and is not given to the command."""
    return click.option("--threads", type=click.IntRange(min=1), callback=_threads, expose_value=False,
                        help="CPU threads; on a busy machine, fewer than its processors.  "
                             "[default: PyTorch's choice]")(command)


def batch_size_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--batch-size``."""
    return click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Images at a time.")(command)


def ema_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--ema/--no-ema``, given to the command as ``ema``."""
    return click.option("--ema/--no-ema", default=True,
                        help="Take the moving average of the weights, or the last ones.")(command)


def seed_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--seed``."""
    return click.option("--seed", type=click.IntRange(min=0), default=0,
                        help="The same seed gives the same images.")(command)


class _Std(click.ParamType):
    name = "STD[,STD…]"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float | tuple[float, ...]:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number or several with commas between them.", parameter, context)
        if not all(0 <= number < float("inf") for number in numbers):
            self.fail(f"{value!r}: standard deviations are at least 0.", parameter, context)
        return numbers[0] if len(numbers) == 1 else numbers


def std_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--std``, given to the command as a number, several, or None; see :func:`sampling_std`."""
    return click.option("--std", type=_Std(), help="Standard deviation of the latents: smaller is cleaner, larger more "
                        "varied. Or one per level, finest first: 0.5,0.7,0.8. Of an HFlow, a last one more is the "
                        "endblock's, else 1.  [default: SAMPLE_BASE_SIGMA of the configuration]")(command)


def sampling_std(
    model: nn.Module, config: Mapping[str, Any], std: float | tuple[float, ...] | None
) -> float | tuple[float, ...]:
    """What ``--std`` says, or else the configuration, once it is known to fit the model.

    Raises:
        click.BadParameter: it has another number of values than the model takes.
    """
    from ..training import OutputConfig

    if std is None:
        std = OutputConfig.parse(config.get("OUTPUT", {}), "OUTPUT").sample_base_sigma
    try:
        model.latent_stds(std)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--std") from None
    return std


def label_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--label``, given to the command as ``class_name``; see :func:`chosen_label`."""
    return click.option("--label", "class_name", metavar="CLASS",
                        help="Of a class-conditional model: the class, by name or number.")(command)


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes of a class-conditional model, as far as its configuration has them."""
    return config.get("GENERAL", {}).get("CLASS_NAMES") or []


def chosen_label(
    model: nn.Module, config: Mapping[str, Any], class_name: str | None, *, required: bool = True
) -> int | None:
    """The number of the class that ``--label`` says; None for a model without classes.

    Args:
        model: class-conditional if it has ``num_classes`` above 0.
        config: of the model.
        class_name: what was given.
        required: whether a class-conditional model has to be given one.

    Raises:
        click.BadParameter: there is no such class, or it is missing; the text lists the classes.
    """
    from ..data.classes import number_of_classes
    from ..errors import ConfigError
    from ..inference.labels import class_number, listed

    classes, names = number_of_classes(model), class_names(config)
    if class_name is None:
        if classes and required:
            raise click.BadParameter(f"the model is class-conditional, so a class is needed; {listed(classes, names)}.",
                                     param_hint="--label")
        return None
    if not classes:
        raise click.BadParameter("this model has no classes; leave it out.", param_hint="--label")
    try:
        return class_number(class_name, classes, names)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint="--label") from None


def pixel_bits(config: Mapping[str, Any]) -> int:
    """How many bits of a pixel's value a model was trained on."""
    return config.get("GENERAL", {}).get("DISCRETIZATION_BITS", 8)


def new_file(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Callback of an option that names a file to make: an existing one is not overwritten."""
    if os.path.lexists(value):
        raise click.BadParameter(f"{value} already exists; give another name.")
    return value
