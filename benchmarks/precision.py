"""What coarser arithmetic in the networks costs: bits per dimension after training, and exactness of reconstructions.

python benchmarks/precision.py DATASET [--config demo] [--steps 500] [--device cuda] [--modes fp32 bf16] [--dry-run]
python benchmarks/precision.py DATASET --start CHECKPOINT --rate 0.1 --steps 400

Trains one model per mode, from the same weights, on the same images in the same order with the same noise. Training
amplifies rounding, so two runs differ whatever the mode; the mode "control" shows by how much: it is fp32 from weights
that differ by a millionth. All have one memory format, since noise is drawn in its order. Then, with each model's moving
average:

bits/dim       on held-out images, in the model's own mode
− fp32         how much more than the model trained in fp32
fixed weights  how much more the weights trained in fp32 cost when they are evaluated in this mode, with the same noise
max, mean      error of held-out images encoded and decoded again, in steps of 8 bits
max f32        the largest when latents are rounded to float32 in between

With --start, all modes go on from a trained model, and with a small --rate settle where their arithmetic lets them: there
two runs differ by far less than two that are trained from the beginning, whose paths part early.

DATASET is a folder made by hflow-fast dataset. Where there are no bfloat16 instructions, the numbers are those of bf16
and the time is not.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.configs import load_config
from hflow_fast.data import ImageDataset, from_uint8
from hflow_fast.models import HFlow
from hflow_fast.training import RunDirectory, Trainer
from hflow_fast.training.checkpoint import load_initial_weights, read_checkpoint
from hflow_fast.training.evaluation import evaluation_indices, held_out_bits_per_dim

RESULTS = Path(__file__).parent / "results" / "accuracy"
BATCH = 16
STEPS = 256
RATES = "LEARNING_RATE", "LEARNING_RATE_DECODERS", "LEARNING_RATE_ENCODERS"


class Outcome(NamedTuple):
    """One mode's numbers; see the module's text."""

    bits: float
    fixed_weights: float
    max_error: float
    mean_error: float
    max_error_float32: float
    seconds_per_step: float


def set_mode(model: HFlow, mode: str) -> HFlow:
    on_gpu = next(model.parameters()).is_cuda
    return model.set_precision("fp32" if mode == "control" else mode, channels_last=on_gpu)


@torch.no_grad()
def nudge(model: HFlow) -> None:
    """Every parameter by about a millionth of it."""
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))


def train(config: dict, dataset: ImageDataset, mode: str, options: argparse.Namespace) -> tuple[HFlow, float]:
    """The moving average after so many steps, and seconds per step."""
    device, steps = options.device, options.steps
    torch.manual_seed(config["GENERAL"]["SEED"])
    model = HFlow.from_config(config)
    if options.start:
        load_initial_weights(model, options.start)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, dataset, RunDirectory.create(Path(folder) / "run", config), config, device)
        set_mode(trainer.model, "fp32")
        trainer.initialize()
        set_mode(trainer.model, mode)
        if mode == "control":
            nudge(trainer.model)
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return set_mode(trainer.average, mode), (time.perf_counter() - begin) / steps


def bits(model: HFlow, dataset: ImageDataset, count: int) -> float:
    indices = evaluation_indices(len(dataset.held_out), count)
    return held_out_bits_per_dim(model, dataset.held_out, indices, batch_size=BATCH)["held_out_bits_per_dim"]


@torch.no_grad()
def errors(model: HFlow, dataset: ImageDataset, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of reconstructed images, in steps of 8 bits."""
    device, found = next(model.parameters()).device, []
    for batch in evaluation_indices(len(dataset.held_out), count).split(BATCH):
        x = from_uint8(dataset.held_out[batch]).to(device)
        latents, _ = model.encode(x)
        decoded, _ = model.decode([latent.to(dtype or latent.dtype) for latent in latents])
        found.append((decoded - x).abs().cpu() * STEPS)
    return torch.cat(found)


def measure(options: argparse.Namespace, config: dict, dataset: ImageDataset) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    reference: HFlow | None = None
    for mode in dict.fromkeys(["fp32", *options.modes]):
        model, seconds = train(config, dataset, mode, options)
        reference = reference or copy.deepcopy(model)
        own = bits(model, dataset, options.images)
        fixed = bits(set_mode(reference, mode), dataset, options.images)
        if mode == "fp32":
            base = fixed
        error, rounded = (errors(model, dataset, options.images, dtype) for dtype in (None, torch.float32))
        largest, mean = float(error.max()), float(error.mean())
        outcomes[mode] = Outcome(own, fixed - base, largest, mean, float(rounded.max()), seconds)
        print(f"{mode:<8} {own:9.4f} {own - outcomes['fp32'].bits:+8.4f} {fixed - base:+14.4f} {largest:9.1e} {mean:9.1e} "
              f"{rounded.max():9.1e} {seconds:7.2f}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--start", type=Path, help="checkpoint or run of the same --config whose average to go on from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=128, help="held-out images, at most")
    parser.add_argument("--modes", nargs="+", choices=["fp32", "control", "tf32", "bf16"],
                        help="beside fp32; by default all that differ on the device")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args()
    options.modes = options.modes or ["control", *(["tf32"] if options.device.type == "cuda" else []), "bf16"]
    config = load_config(options.config)
    general = config["GENERAL"]
    general |= {"DATASET_PATH": str(options.dataset), "SEED": options.seed, "STEPS": options.steps}
    general |= {key: general[key] * options.rate for key in RATES}
    start_step = read_checkpoint(options.start).notes["step"] if options.start else 0
    where = provenance(options.device)
    print(f"{where['device']}, torch {where['torch']}, {options.config}, {options.steps} steps after {start_step}, "
          f"learning rates × {options.rate:g}, seed {options.seed}")
    print(f"{'mode':<8} {'bits/dim':>9} {'− fp32':>8} {'fixed weights':>14} {'max':>9} {'mean':>9} {'max f32':>9} "
          f"{'s/step':>7}")
    outcomes = measure(options, config, ImageDataset.open(options.dataset))
    if not options.dry_run:
        setting = {"config": options.config, "start_step": start_step, "steps": options.steps, "rate": options.rate,
                   "seed": options.seed, "images": options.images}
        append_csv(options.results / "precision.csv", [
            setting | {"mode": mode} | {name: f"{value:.4e}" if "error" in name else f"{value:.4f}"
                                        for name, value in outcome._asdict().items()} | where
            for mode, outcome in outcomes.items()])


if __name__ == "__main__":
    main()
