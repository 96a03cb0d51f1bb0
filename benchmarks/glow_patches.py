"""Small Glows on patches of photographs: Glow's permutations beside each other and beside the best single Gaussian.

python scripts/photo_patches.py .cache/patches.zip
hflow-fast dataset .cache/patches.zip .cache/patches --resolution 8
python benchmarks/glow_patches.py .cache/patches [--jobs 2] [--steps 3000] [--seeds 0 1 2] [--markdown] [--dry-run]

Trains one model per permutation (reverse, shuffle, 1x1) and seed, each on one thread for the same number of steps, on
the same patches in an order that the seed decides; then measures bits per dimension of the held-out patches with the
moving average of the weights, in the mean over --draws draws of the dequantisation noise. The Gaussian has full
covariance, is fitted to the training patches, with the shrinkage that cross-validation on them chooses, and is evaluated
in the exact mean over the noise.

Half widths are of the 95 % interval over the choice of held-out patches: of the mean, and of the difference from the
Gaussian, patch by patch. A finished model is appended to the results at once and not trained again by the same call.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Iterator

import torch

from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.data import ImageDataset
from hflow_fast.metrics import Estimate, FullGaussian
from hflow_fast.models import Glow
from hflow_fast.training import RunDirectory, Trainer, likelihood_bounds

RESULTS = Path(__file__).parent / "results" / "model" / "glow_patches.csv"
PAGE = Path(__file__).parent.parent / "docs" / "glow.md"
MARKS = "<!-- results: patches -->", "<!-- /results: patches -->"
PERMUTATIONS = "reverse", "shuffle", "1x1"
MODEL = {"LEVELS": 2, "STEPS": 8, "WIDTH": 64, "COUPLING": "affine"}
TRAINING = {"LEARNING_RATE": 1e-3, "OPTIMIZER": "adamax", "WARMUP_EPOCHS": 1, "BATCH_SIZE": 64,
            "SAMPLES_PER_GRAD_EVAL": 64, "HORIZONTAL_FLIPS": False}
EVALUATION_BATCH = 256

Row = dict[str, Any]


def settings(dataset: ImageDataset, steps: int, draws: int) -> Row:
    """What makes results comparable, and a finished model the one that was asked for."""
    about = {"dataset": dataset.path.name, "fingerprint": dataset.fingerprint[:12], "patches": len(dataset.train),
             "held_out": len(dataset.held_out), "resolution": dataset.resolution}
    about |= {key.lower(): value for key, value in (MODEL | TRAINING).items() if key != "STEPS"}
    return about | {"steps_per_level": MODEL["STEPS"], "steps": steps, "draws": draws}


def configuration(resolution: int, permutation: str, seed: int, steps: int) -> dict[str, Any]:
    return {"MODEL": "glow", "GENERAL": TRAINING | {"SEED": seed, "STEPS": steps},
            "MODEL_PARAMETERS": MODEL | {"RESOLUTION": resolution, "PERMUTATION": permutation}}


def measure(path: Path, permutation: str, seed: int, steps: int, draws: int) -> Row:
    """Trains and evaluates one model."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dataset = ImageDataset.open(path)
    config = configuration(dataset.resolution, permutation, seed, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Glow.from_config(config), dataset, RunDirectory.create(Path(folder) / "run", config), config)
        begin = time.perf_counter()
        trainer.initialize()
        for _ in range(steps):
            trainer.step()
        seconds = time.perf_counter() - begin
    bounds = likelihood_bounds(trainer.average, dataset.held_out, torch.arange(len(dataset.held_out)),
                               batch_size=EVALUATION_BATCH, draws=draws)
    gaussian = FullGaussian.fit(dataset.train)
    baseline = gaussian.bits_per_dim(dataset.held_out)
    total, gain = Estimate.of(bounds.total), Estimate.of(baseline - bounds.total)
    return {
        "permutation": permutation, "seed": seed, "bits_per_dim": f"{total.mean:.4f}",
        "half_width": f"{total.half_width:.4f}", "gaussian": f"{float(baseline.mean()):.4f}",
        "shrinkage": f"{gaussian.shrinkage:g}", "gain": f"{gain.mean:.4f}", "gain_half_width": f"{gain.half_width:.4f}",
        "seconds": f"{seconds:.0f}", **settings(dataset, steps, draws),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        **provenance(torch.device("cpu")),
    }


def finished(path: Path, wanted: Row) -> dict[tuple[str, int], Row]:
    """The results of these settings that are there already, by permutation and seed."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in wanted.items())]
    return {(row["permutation"], int(row["seed"])): row for row in rows}


def run(options: argparse.Namespace, dataset: ImageDataset) -> dict[tuple[str, int], Row]:
    done = finished(options.results, settings(dataset, options.steps, options.draws))
    # Seed by seed, so that an interrupted comparison has whole rounds.
    cells = [(permutation, seed) for seed in options.seeds for permutation in options.permutations]
    missing = [cell for cell in cells if cell not in done]
    print(f"{len(cells) - len(missing)} of {len(cells)} models are finished, {len(missing)} to train")
    for row in measured(options, missing):
        done[row["permutation"], row["seed"]] = row
        print(f"{row['permutation']:<8} seed {row['seed']}  {row['bits_per_dim']} bits/dim, "
              f"Gaussian {row['gaussian']}, {row['seconds']} s", flush=True)
        if not options.dry_run:
            append_csv(options.results, [row])
    return {cell: done[cell] for cell in cells}


def measured(options: argparse.Namespace, cells: list[tuple[str, int]]) -> Iterator[Row]:
    """The rows of the cells, as they are finished."""
    if options.jobs == 1:
        for cell in cells:
            yield measure(options.dataset, *cell, options.steps, options.draws)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, options.dataset, *cell, options.steps, options.draws) for cell in cells]
        for future in as_completed(futures):
            yield future.result()


def table(rows: dict[tuple[str, int], Row]) -> str:
    """The comparison in Markdown."""
    seeds = sorted({seed for _, seed in rows})
    first = next(iter(rows.values()))
    lines = [f"| held-out bits/dim | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | less than the Gaussian |",
             f"| --- |{' ---: |' * (len(seeds) + 2)}",
             f"| Gaussian, full covariance |{' |' * len(seeds)} {float(first['gaussian']):.3f} | |"]
    for permutation in dict.fromkeys(permutation for permutation, _ in rows):
        mine = [rows.get((permutation, seed)) for seed in seeds]
        values = [float(row["bits_per_dim"]) for row in mine if row]
        gains = [(float(row["gain"]), float(row["gain_half_width"])) for row in mine if row]
        cells = [f"{float(row['bits_per_dim']):.3f}" if row else "" for row in mine]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        gain, half_width = (statistics.mean(column) for column in zip(*gains))
        lines.append(f"| Glow, {permutation} | {' | '.join(cells)} | {statistics.mean(values):.3f}{spread} | "
                     f"{gain:.3f} ± {half_width:.3f} |")
    return "\n".join(lines)


def caption(row: Row) -> str:
    """How the numbers came about."""
    return (f"{int(row['patches']):,} training and {int(row['held_out']):,} held-out patches of {row['resolution']} × "
            f"{row['resolution']} pixels. L {row['levels']}, K {row['steps_per_level']}, width {row['width']}, "
            f"{row['coupling']}, {int(row['parameters']):,} parameters (1x1); {row['steps']} steps of "
            f"{row['batch_size']} patches, {row['seconds']} s on one core of {row['device']}. The mean's ± is the "
            "standard deviation over seeds; the difference's is the 95 % interval over patches, narrower than it should be as "
            "far as patches of one tile are alike.")


def write_markdown(text: str, page: Path) -> None:
    """Puts the text between the page's marks."""
    begin, end = MARKS
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page}: has no {begin} … {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
    print(f"wrote {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder made by hflow-fast dataset")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--permutations", nargs="+", default=list(PERMUTATIONS), choices=[*PERMUTATIONS, "1x1_lu"])
    parser.add_argument("--draws", type=int, default=4, help="of the dequantisation noise")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at a time, each on one thread")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file")
    parser.add_argument("--markdown", type=Path, nargs="?", const=PAGE, help="page to write the table into")
    parser.add_argument("--dry-run", action="store_true", help="append nothing to the results")
    options = parser.parse_args()
    rows = run(options, ImageDataset.open(options.dataset))
    text = f"{table(rows)}\n\n{caption(next(reversed(rows.values())))}"
    print(text)
    if options.markdown is not None:
        write_markdown(text, options.markdown)


if __name__ == "__main__":
    main()
