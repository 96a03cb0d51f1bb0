"""``hflow-fast info``."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from ..configs import MODELS, preset_names

__all__ = ["info"]


@click.command()
def info() -> None:
    """Show versions, kernels, devices and presets."""
    import torch

    from .. import _extension

    missing = _extension.missing_reason()
    rows = {
        "hflow_fast": _version(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda or "none (CPU build)",
        "kernels": f"plain PyTorch: {missing}" if missing else "compiled",
        **_extension.build_info(),
        "threads": torch.get_num_threads(),
        "devices": ", ".join(["cpu", *_gpus()]),
    }
    _print_table(rows)
    for model in MODELS:
        click.echo(f"\nPresets of {model}")
        _print_table(_presets(model))


def _version() -> str:
    try:
        return metadata.version("hflow_fast")
    except metadata.PackageNotFoundError:
        return "run from its source folder, not installed"


def _gpus() -> list[str]:
    import torch

    return [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]


def _presets(name: str) -> dict[str, str]:
    import torch

    from ..data.classes import number_of_classes
    from ..models.building import build_model

    rows = {}
    for preset in preset_names(name):
        with torch.device("meta"):  # shapes only: nothing is allocated
            model = build_model(preset)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        classes = f", {number_of_classes(model)} classes" if number_of_classes(model) else ""
        rows[preset] = f"{model.resolution} × {model.resolution} pixels, {count:,} parameters{classes}"
    return rows


def _print_table(rows: dict[str, object]) -> None:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        click.echo(f"  {name:{width}}  {value}")
