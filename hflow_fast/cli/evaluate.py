"""``hflow-fast evaluate``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import device_option, ema_option, new_file, precision_option, threads_option

if TYPE_CHECKING:
    from torch import nn

    from ..data import ImageDataset
    from ..metrics import Fid
    from ..training import TrainConfig

__all__ = ["evaluate"]

_FEW = 30


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Dataset made by hflow-fast dataset.  "
              "[default: DATASET_PATH of the configuration]")
@click.option("--split", type=click.Choice(["held_out", "train"]), default="held_out", help="For the likelihood.")
@click.option("--n", "count", type=click.IntRange(min=1), help="Evaluate on a fixed random choice of this many.  "
              "[default: all]")
@click.option("--draws", type=click.IntRange(min=1), default=1, help="Draws of the noise to average for each image.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the noise, and of the samples for the FID.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time. The noise of HFlow follows each "
              "batch, so compare likelihoods of equal batch size.  [default: BATCH_SIZE of the configuration]")
@click.option("--fid", "network", type=click.Path(path_type=Path), help="Compute the FID too, with this TorchScript "
              "file as feature extractor: StyleGAN's inception-2015-12-05.pt or any that maps (N, 3, H, W), uint8, to "
              "(N, F). TorchScript is code and will be run: take it from a source that you trust.")
@click.option("--fid-n", type=click.IntRange(min=2), help="Samples, and at most as many images, for the FID.  "
              "[default: FID_N_SAMPLES of the configuration]")
@click.option("--fid-std", type=click.FloatRange(min=0), help="Standard deviation of the samples' latents.  "
              "[default: FID_GEN_STD of the configuration]")
@click.option("--fid-split", type=click.Choice(["train", "held_out"]), default="train", help="For the FID.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps features of datasets.  "
              "[default: hflow_fast/features in the user's cache folder]")
@click.option("--json", "record", type=click.Path(path_type=Path), callback=lambda context, parameter, value:
              value and new_file(context, parameter, value), help="Write the numbers to this new file, too.")
@ema_option
@device_option
@precision_option
@threads_option
def evaluate(
    checkpoint: Path, data: Path | None, split: str, count: int | None, draws: int, seed: int, batch_size: int | None,
    network: Path | None, fid_n: int | None, fid_std: float | None, fid_split: str, cache: Path | None,
    record: Path | None, ema: bool, device: str, precision: str | None,
) -> None:
    """Measure a model: bits per dimension, beside baselines, and the FID.

    CHECKPOINT is a run's folder or a checkpoint file. The likelihood is the bound that training reports, on average
    over images, with its 95 % confidence interval; a level's bits are per dimension of that level.

    \b
    hflow-fast evaluate runs/demo --draws 4
    hflow-fast evaluate runs/photos --fid inception-2015-12-05.pt --fid-n 50000 --json photos.json
    """
    from ..data import ImageDataset
    from ..errors import ConfigError, DatasetError
    from ..training import TrainConfig, load_model

    model, config = load_model(checkpoint, average=ema, device=device, precision=precision)
    settings = TrainConfig.from_config(config)
    path = data or settings.general.dataset_path
    if path is None:
        raise ConfigError("the configuration does not name a dataset; give it with --data.")
    dataset = ImageDataset.open(path)
    if dataset.resolution != model.resolution:
        raise DatasetError(f"{path}: its images have {dataset.resolution} px, the model's {model.resolution} px; make "
                           f"a dataset with --resolution {model.resolution}.")
    batch_size = batch_size or settings.general.batch_size
    about = {"checkpoint": str(checkpoint), "data": str(path), "batch_size": batch_size, "seed": seed,
             "moving_average": ema}
    # First what can fail for reasons that only trying finds out.
    fid = None
    if network is not None:
        fid = _fid(model, dataset, settings, network, device, count=fid_n, std=fid_std, split=fid_split, seed=seed,
                   batch_size=batch_size, cache=cache)
    about |= _likelihood(model, dataset, settings, split, count, draws, seed, batch_size)
    if fid is not None:
        about["fid"] = fid
    if record is not None:
        _write(about, record)


def _likelihood(
    model: nn.Module, dataset: ImageDataset, settings: TrainConfig, split: str, count: int | None, draws: int,
    seed: int, batch_size: int,
) -> dict[str, Any]:
    from tqdm import tqdm

    from ..errors import DatasetError
    from ..metrics import Estimate, PixelGaussian, evaluation_indices, uniform_bits_per_dim
    from ..training import likelihood_bounds

    images, bits = getattr(dataset, split), settings.general.discretization_bits
    if not len(images):
        raise DatasetError(f"{dataset.path}: there are no {split} images in it; choose the other --split.")
    indices = evaluation_indices(len(images), count or len(images))
    with tqdm(total=draws * len(indices), unit=" images", desc="likelihood", disable=None) as bar:
        bounds = likelihood_bounds(model, images, indices, batch_size=batch_size, bits=bits, draws=draws, seed=seed,
                                   progress=bar.update)
    total, levels = bounds.estimates()
    gaussian = None
    if len(dataset.train):
        gaussian = Estimate.of(PixelGaussian.fit(dataset.train, bits).bits_per_dim(images[indices])[None])

    click.echo(f"{dataset.path}, {len(indices)} of {len(images)} {split} images of {bits} bits, {draws} "
               f"draw{'s' * (draws > 1)} of the noise, batches of {batch_size}")
    click.echo(f"  {'':20}{'bits/dim':>10}{'± 95 %':>10}{'of noise':>10}")
    rows = [("model", total), *((f"  level {name}", value) for name, value in reversed(levels.items()))]
    for name, value in [*rows, ("Gaussian per pixel", gaussian)]:
        if value is not None:
            spread, noise = (f"{number:10.4f}" if math.isfinite(number) else f"{'–':>10}"
                             for number in (value.half_width, value.noise_half_width))
            click.echo(f"  {name:20}{value.mean:10.4f}{spread}{noise}")
    click.echo(f"  {'uniform':20}{uniform_bits_per_dim(bits):10.4f}")
    if len(indices) < _FEW:
        click.echo(f"{len(indices)} images are few: the intervals are rough.")
    return {
        "split": split, "images": len(indices), "bits": bits, "draws": draws, "bits_per_dim": vars(total),
        "levels": {name: vars(value) for name, value in levels.items()},
        "baselines": {"uniform": uniform_bits_per_dim(bits), "pixel_gaussian": gaussian and vars(gaussian)},
    }


def _fid(
    model: nn.Module, dataset: ImageDataset, settings: TrainConfig, network: Path, device: str, *, count: int | None,
    std: float | None, split: str, seed: int, batch_size: int, cache: Path | None,
) -> dict[str, Any]:
    from tqdm import tqdm

    from ..metrics import FeatureExtractor, default_cache, fid_of_model

    click.echo(f"{network}: TorchScript is code, and it is run now.", err=True)
    extractor = FeatureExtractor.load(network, device)
    count = count or settings.output.fid_n_samples
    std = settings.output.fid_gen_std if std is None else std
    with tqdm(unit=" images", desc="FID", disable=None) as bar:
        fid: Fid = fid_of_model(model, dataset, extractor, n=count, std=std, seed=seed, split=split,
                                batch_size=batch_size, cache=cache or default_cache(), progress=bar.update)
    click.echo(f"FID {fid.value:.3f}: {fid.generated} samples at std {std:g}, {fid.real} {split} images, "
               f"{fid.features} features")
    if fid.caution:
        click.echo(fid.caution)
    return vars(fid) | {"std": std, "split": split, "extractor_sha256": extractor.key}


def _write(numbers: dict[str, Any], path: Path) -> None:
    """Writes JSON, in which what is not a number is null."""
    from .._files import replacing

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(numbers), indent=2) + "\n")
