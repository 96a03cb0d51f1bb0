"""The demo: from a zip of images to a trained hierarchical flow, its pictures and its likelihood.

Runs the commands a user would type, then measures the model against two baselines on the same held-out images.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

from hflow_fast._files import replacing
from hflow_fast.configs import load_config
from hflow_fast.data import ImageDataset, dequantize
from hflow_fast.inference import draw_samples, image_grid, reconstruct, save_png
from hflow_fast.metrics import PixelGaussian, uniform_bits_per_dim
from hflow_fast.training import TrainConfig, load_model, read_metrics
from hflow_fast.training.evaluation import held_out_bits_per_dim

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend has to be chosen first)

# One processor is left to other programs: a thread that has to share its processor holds up all the others.
THREADS = min(8, max(1, (os.cpu_count() or 1) - 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="preset or JSON file")
    parser.add_argument("--images", type=Path, default=Path("datasets/noto_emoji_64.zip"))
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()

    results = arguments.run / "metrics.json"
    if results.is_file():
        print(f"{arguments.run} is a finished demo; another one: make demo RUN=runs/<name>")
        metrics = json.loads(results.read_text())
    else:
        data = prepare(arguments.images, load_config(arguments.config)["MODEL_PARAMETERS"]["RESOLUTIONS"][0])
        train(arguments.config, data, arguments.run)
        metrics = measure(arguments.run, ImageDataset.open(data))
        with replacing(results) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    return report(metrics, arguments.run)


def prepare(images: Path, resolution: int) -> Path:
    data = Path(".cache") / f"{images.stem}_at_{resolution}"
    command("dataset", images, data, "--resolution", resolution)
    return data


def train(config: str, data: Path, run: Path) -> None:
    start = ("--resume",) if (run / "config.json").is_file() else ("--config", config, "--data", data)
    command("train", "--run", run, *start, "--threads", THREADS)


def measure(run: Path, dataset: ImageDataset) -> dict[str, Any]:
    """Draws the pictures of a trained run and returns its numbers."""
    torch.set_num_threads(THREADS)
    model, config = load_model(run)
    checked = TrainConfig.from_config(config)
    bits = checked.general.discretization_bits
    everything = torch.arange(len(dataset.held_out))
    gaussian = PixelGaussian.fit(dataset.train, bits)
    metrics = {
        **held_out_bits_per_dim(model, dataset.held_out, everything, batch_size=checked.general.batch_size, bits=bits),
        "uniform_bits_per_dim": uniform_bits_per_dim(bits),
        "pixel_gaussian_bits_per_dim": float(gaussian.bits_per_dim(dataset.held_out).mean()),
        "held_out_images": len(everything),
        "training_images": len(dataset.train),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    metrics |= {"steps": records[-1]["step"], "training_seconds": records[-1]["seconds"]}

    samples = draw_samples(model, 64, std=checked.output.sample_base_sigma, seed=0)
    save_png(image_grid(samples, 8), run / "samples.png")
    images = dequantize(dataset.held_out[everything[:8]], bits=bits, generator=torch.Generator().manual_seed(0))
    save_png(image_grid(reconstruct(model, images), 8), run / "reconstructions.png")
    draw_loss(run, metrics)
    return metrics


def draw_loss(run: Path, metrics: dict[str, Any]) -> None:
    records = read_metrics(run / "metrics.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key, title in ((left, "loss", "training loss (weighted sum over the levels)"),
                             (right, "held_out_bits_per_dim", "held-out images, bits/dim")):
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points), label="hflow_fast")
        axes.set(xlabel="optimizer step", title=title)
        axes.grid(alpha=0.3)
    right.axhline(metrics["uniform_bits_per_dim"], color="grey", linestyle=":", label="uniform")
    right.axhline(metrics["pixel_gaussian_bits_per_dim"], color="tab:red", linestyle="--", label="Gaussian per pixel")
    right.legend()
    with replacing(run / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def report(metrics: dict[str, Any], run: Path) -> int:
    """Prints the result; 0 if the model beats both baselines, 1 if not."""
    model = metrics["held_out_bits_per_dim"]
    baselines = metrics["uniform_bits_per_dim"], metrics["pixel_gaussian_bits_per_dim"]
    print(f"\nHeld-out bits/dim, {metrics['held_out_images']} images (lower is better)")
    print(f"  uniform             {baselines[0]:7.3f}")
    print(f"  Gaussian per pixel  {baselines[1]:7.3f}")
    print(f"  this model          {model:7.3f}   after {metrics['steps']} steps, {metrics['training_seconds']:.0f} s")
    print(f"Pictures: {run}/samples.png, {run}/reconstructions.png, {run}/loss.png")
    if model < min(baselines):
        return 0
    print("The model does not beat both baselines.", file=sys.stderr)
    return 1


def command(*arguments: object) -> None:
    """Shows and runs ``hflow-fast`` with these arguments; ends the demo where it fails."""
    words = list(map(str, arguments))
    print("$ hflow-fast", *words, flush=True)
    # Ctrl-C reaches the command too, which saves; here it only has to be waited for.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    code = subprocess.run([sys.executable, "-m", "hflow_fast", *words]).returncode
    signal.signal(signal.SIGINT, previous)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
