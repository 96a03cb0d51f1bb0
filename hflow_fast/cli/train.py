"""``hflow-fast train``."""

from __future__ import annotations

import itertools
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .._allocator import keep_freed_memory
from ..configs import MODELS, load_config, preset_names
from .options import device_option, precision_option, threads_option

if TYPE_CHECKING:
    from ..training import GeneralConfig

__all__ = ["train"]


@click.command()
@click.option("--model", "kind", type=click.Choice(MODELS), help="Which model the configuration has to be of.")
@click.option("--config", help="A preset (see hflow-fast info) or a JSON file. With --resume it takes the place of the "
              "run's config.json, if nothing has changed in it that cannot change during a run.")
@click.option("--data", type=click.Path(path_type=Path), help="Dataset folder made by hflow-fast dataset.")
@click.option("--run", "directory", type=click.Path(path_type=Path),
              help="Folder of the run.  [default: a new one, runs/<config>-<number>]")
@click.option("--resume", is_flag=True, help="Continue the run from its latest checkpoint.")
@click.option("--init-from", type=click.Path(path_type=Path), help="Start a new run from the weights of this "
              "checkpoint or run (LOAD_CHECKPOINT) instead of random ones, such as a model made by hflow-fast import.")
@click.option("--steps", type=click.IntRange(min=1), help="End after this many optimizer steps.")
@click.option("--epochs", type=click.IntRange(min=1), help="End after this many passes over the data.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="End after this much training time.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images per forward pass (BATCH_SIZE); gradients are "
              "accumulated over SAMPLES_PER_GRAD_EVAL images, or this many if it is more.")
@click.option("--merge-batches", type=click.IntRange(min=1), help="Forward passes that are run as one (MERGE_BATCHES): "
              "quicker, and more memory; the same gradients.  [default: as many as there is memory for]")
@click.option("--memory", type=click.Choice(["store", "recompute"]), help="Keep the activations for the backward pass, "
              "or compute them again in it (MEMORY): more time, a fraction of the memory; the same gradients.")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order and noise.")
@click.option("--cuda-graph/--no-cuda-graph", default=None, help="On a GPU, replay each step from CUDA graphs, or "
              "launch it piece by piece.  [default: graphs, unless they cannot be captured]")
@device_option
@precision_option
@threads_option
def train(
    kind: str | None, config: str | None, data: Path | None, directory: Path | None, resume: bool,
    init_from: Path | None, steps: int | None, epochs: int | None, hours: float | None, batch_size: int | None,
    merge_batches: int | None, memory: str | None, seed: int | None, cuda_graph: bool | None, device: str,
    precision: str | None,
) -> None:
    """Train a model.

    \b
    hflow-fast train --config A-128 --data celeba-128 --run runs/first --hours 96
    hflow-fast train --model glow --config glow-cifar10 --data cifar-32
    hflow-fast train --run runs/first --resume

    Training ends at the first of --steps, --epochs and --hours, counted over all sessions of the run; given here,
    they replace those of the configuration. Ctrl-C saves a checkpoint and ends.

    On N GPUs or processors: torchrun --nproc-per-node N -m -- hflow_fast train …
    """
    import torch

    from ..data import ImageDataset
    from ..data.classes import number_of_classes
    from ..models.building import build_model
    from ..training import RunDirectory, Session, TrainConfig, Trainer, process_group
    from ..training.checkpoint import load_initial_weights
    from ..training.checks import check_cuda_graph, check_dataset, check_ranks
    from ..training.fid import load_extractor

    with process_group(device) as ranks, ExitStack() as stack:
        if directory is None and config is not None and not resume:
            directory = ranks.gather(_new_directory(config))[0]
        with ranks.together():  # all that can be wrong is found out before the run's folder is made
            settings = _settings(kind, config, directory, resume)
            _override(settings.setdefault("GENERAL", {}), data, {"STEPS": steps, "EPOCHS": epochs, "HOURS": hours},
                      batch_size, {
                          "MERGE_BATCHES": merge_batches, "MEMORY": memory, "SEED": seed,
                          "LOAD_CHECKPOINT": None if init_from is None else str(init_from.absolute()),
                          "PRECISION": precision, "CUDA_GRAPH": {None: None, True: "on", False: "off"}[cuda_graph]})
            general = TrainConfig.from_config(settings).general
            if general.dataset_path is None:
                raise click.UsageError("give the dataset with --data.")
            dataset = ImageDataset.open(general.dataset_path)
            keep_freed_memory(general.memory == "store")  # a quarter more memory: not where it is scarcer than time
            torch.manual_seed(general.seed)
            torch.backends.cudnn.benchmark = True  # all batches have the same shape
            model = build_model(settings)
            if general.load_checkpoint is not None and not resume:
                load_initial_weights(model, general.load_checkpoint)
            check_dataset(dataset, model.resolution, general, number_of_classes(model))
            check_cuda_graph(torch.device(device), general)
            check_ranks(ranks.count, general)
            if ranks.is_writer:
                load_extractor(TrainConfig.from_config(settings), model.resolution, "cpu")
            run = RunDirectory(directory)
            if ranks.is_writer:
                if not resume:
                    RunDirectory.create(directory, settings)
                stack.enter_context(run.lock())
            trainer = Trainer(model, dataset, run, settings, device, ranks)
            if resume and ranks.is_writer:
                run.write_config(settings)
            session = Session(trainer)

        def say(text: str) -> None:
            if ranks.is_writer:
                click.echo(f"{run.path}: {text}")

        if session.finished:
            say(f"already trained to step {trainer.step_count}; give --steps, --epochs or --hours to go further.")
            return
        what = f"training goes on at step {trainer.step_count}" if resume else f"training {config}"
        say(f"{what}, {general.dataset_path}{_sharing(general, ranks.count)}")
        ended = session.run()
        if ended != "finished":
            say(f"{ended} at step {trainer.step_count}, saved; continue with --resume.")
            raise SystemExit(128 + signal.Signals[ended])
        say(f"finished at step {trainer.step_count}.")


def _settings(kind: str | None, config: str | None, directory: Path | None, resume: bool) -> dict[str, Any]:
    """The configuration of a new run; or that of a run that goes on, unless another one is given."""
    from ..training import RunDirectory

    if not resume:
        if config is None:
            presets = f", which may be {', '.join(preset_names(kind))}," if kind is not None else ""
            raise click.UsageError(f"give --config{presets} to start a run, or --resume to continue one.")
        return load_config(config, model=kind)
    if directory is None:
        raise click.UsageError("say which run to continue with --run.")
    own = RunDirectory.open(directory).read_config()
    if config is None:
        return load_config(own, model=kind)
    settings = load_config(config, model=kind)
    general = settings.setdefault("GENERAL", {})
    for key in ("DATASET_PATH", "LOAD_CHECKPOINT"):
        if general.get(key) is None:  # as in the presets
            general[key] = own["GENERAL"].get(key)
    return settings


def _sharing(general: GeneralConfig, processes: int) -> str:
    """What there is to say about the number of processes."""
    passes, wanted = general.samples_per_grad_eval // general.batch_size, general.num_gpus
    text = f"; {processes} processes share the {passes} passes of a step" if processes > 1 else ""
    if passes % processes:
        text += f" unequally, so some wait: {passes} is best divided by their number"
    if wanted not in (1, processes):  # 1 is what the presets say, for any number
        text += (f"; NUM_GPUS is {wanted}, but the processes are {processes}, which gives the same gradients: "
                 f"torchrun --nproc-per-node {wanted} -m -- hflow_fast train … starts as many")
    return text


def _new_directory(config: str) -> Path:
    """runs/<config>-<number> with the first number that is free."""
    stem = Path(config).stem
    return next(path for number in itertools.count(1) if not (path := Path("runs") / f"{stem}-{number}").exists())


def _override(
    general: dict[str, Any], data: Path | None, limits: dict[str, Any], batch_size: int | None, others: dict[str, Any]
) -> None:
    """Writes the options that were given over the keys of section GENERAL."""
    if any(limits.values()):
        general.update(limits)
    if data is not None:
        general["DATASET_PATH"] = str(data.absolute())
    if batch_size is not None:
        general["BATCH_SIZE"] = batch_size
        general["SAMPLES_PER_GRAD_EVAL"] = max(batch_size, general.get("SAMPLES_PER_GRAD_EVAL", 0))
    general.update((key, value) for key, value in others.items() if value is not None)
