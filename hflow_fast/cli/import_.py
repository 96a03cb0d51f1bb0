"""``hflow-fast import``."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["import_command"]


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", help="A preset or JSON file to use instead of the settings in SOURCE; needed when SOURCE "
              "is a state dict.")
def import_command(source: Path, out: Path, config: str | None) -> None:
    """Turn a model of the original HFlow into one of ours.

    SOURCE is a checkpoint (model.bin) of the original, or its network's state dict as .safetensors. Nothing in it is
    run or imported. OUT becomes a safetensors file with the configuration in it, which every other command takes; an
    existing file is never replaced.
    """
    from ..compat import import_file
    from ..errors import CheckpointError
    from ..training import save_checkpoint

    if os.path.lexists(out):
        raise CheckpointError(f"{out}: already exists; give the imported model another name.")
    imported = import_file(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, imported.config, imported.model)
    model, original = imported.model, imported.original
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    levels = ", ".join(map(str, model.config.resolutions))
    click.echo(f"{source}: {'a checkpoint' if original else 'a state dict'} of the original HFlow")
    click.echo(f"  model      {model.resolution} × {model.resolution} pixels, levels {levels} and the endblock, "
               f"{count:,} parameters")
    click.echo(f"  weights    {imported.tensors:,} tensors" + (", the moving average" if original else ""))
    if original:
        click.echo(f"  ignored    {original.source_bytes:,} bytes of Python source, not run; "
                   f"the optimizer's state, {original.optimizer_bytes:,} bytes")
    if imported.left_out:
        click.echo(f"  left out   settings {', '.join(imported.left_out)}")
    click.echo(f"{out}: written; try hflow-fast sample {out} --out samples")
