"""HFlow beside the original implementation, with the same weights, in one run.

python benchmarks/vs_original.py --original DIR [--config A-128] [--batch 4] [--groups 4] [--only training,sampling]

DIR is a checkout of https://github.com/timoneh/hflow, which is imported as it is: nothing of it is changed or copied.
First, losses and every gradient are compared, without noise, in float64. Then all sides are timed in turn, many times,
in sampling and encoding with one call before that is not timed, as batches follow one another there:

- training: one optimizer step: forward and backward passes of --groups micro-batches of --batch images, clipping, Adam
  and the moving average of the weights. The original's reads each loss, as its own loop does.
- sampling: --batch random images, brought to the processor. The original has its inverses computed before.
- encoding: --batch images to latents.
- memory: peak of a training step in a process of its own, above what the imports take.
- activity, of a GPU only: how much of a training step some kernel runs, how many, and how often the host waits.

Like hflow-fast, our sides but recompute keep memory of the processor that they free (hflow_fast.keep_freed_memory); the
original, which sets nothing, returns it. With MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 before the command,
all keep it.

Ours comes in modes: plain (every pass computes its own weights), prepared (once per step, as the trainer does),
channels_last (prepared, with weights and so everything else in that format: the trainer's choice with AVX2 or more), bf16
(prepared, networks in bfloat16, channels_last), merge (prepared, all micro-batches of a step in one pass that keeps
their statistics apart), recompute (prepared, activations computed again in the backward pass), graph (prepared, and
replayed from CUDA graphs, where there are any) and compile (prepared, passes through torch.compile); bf16+merge is
both. On a GPU both sides may use TF32, as the original does, unless --precision fp32. The original with torch.compile,
--compile, takes half an hour to compile on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hflow_fast import keep_freed_memory
from hflow_fast._replay import WARM_UP, Replay, cuda_recorder
from hflow_fast.bench.activity import Activity, device_activity
from hflow_fast.bench.agreement import (
    float64_by_default,
    smooth_images,
    typical_norm,
    worst_gradient,
)
from hflow_fast.bench.measure import QUANTILES
from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.bench.turns import quantiles, resident, time_in_turn
from hflow_fast.configs import load_config
from hflow_fast.inference.graphs import replayed
from hflow_fast.models import HFlow, Noise
from hflow_fast.models.hflow.original import original_names
from hflow_fast.nn import set_recompute
from hflow_fast.training.config import TrainConfig
from hflow_fast.training.ema import update_average
from hflow_fast.training.optimizer import build_optimizer, clip_and_step

RESULTS = Path(__file__).parent / "results" / "model"
MODES = ("plain", "prepared", "channels_last", "bf16", "merge", "recompute", "graph", "compile")
if torch.cuda.is_available():
    DEFAULT_MODES = ["plain", "prepared", "graph", "graph+merge", "graph+bf16", "graph+bf16+merge"]
else:
    DEFAULT_MODES = ["plain", "prepared", "channels_last", "channels_last+merge"]
    DEFAULT_MODES += ["bf16", "bf16+merge"] if torch.cpu._is_amx_tile_supported() else []
WORKS = ("training", "sampling", "encoding", "memory", "activity")
EMA_WEIGHT = 0.005
TOLERANCE = 1e-6
"""Relative, in float64: what the two may differ by."""


class Settings(dict):
    """A section of a configuration as the original takes it: lower-case keys, read as attributes."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Settings:
        return cls((key.lower(), cls.of(value) if isinstance(value, Mapping) else copy.deepcopy(value))
                   for key, value in section.items())  # fmt: skip


class Original:
    """The original's network with training, sampling and encoding as its own programs do them."""

    def __init__(self, folder: Path, config: Mapping[str, Any], device: torch.device, compile: bool = False) -> None:
        package = types.ModuleType("hflow")
        package.__path__ = [str(folder / "hflow")]
        sys.modules["hflow"] = package  # its own __init__ would import plotting, datasets and TensorBoard
        network = importlib.import_module("hflow.network")
        with contextlib.redirect_stdout(sys.stderr):
            self.network = network.MultiStep(**Settings.of(config["MODEL_PARAMETERS"])).to(device)
        self.network.device = str(device)  # a constant "cuda:0" there
        self.compile = compile
        self.general = config["GENERAL"]

    def ready(self) -> None:
        """What a training run and an inference program set up around the network."""
        net, general = self.network, self.general
        groups = ((net.encoder_parameters(), "LEARNING_RATE_ENCODERS"), (net.non_encoder_parameters(), "LEARNING_RATE"),
                  (net.decoder_parameters(), "LEARNING_RATE_DECODERS"))  # fmt: skip
        self.optimizer = torch.optim.Adam([{"params": parameters, "lr": general[key]} for parameters, key in groups])
        self.average = copy.deepcopy(net)
        self.loss = torch.compile(net.loss) if self.compile else net.loss
        self.inverse = torch.compile(net.inverse) if self.compile else net.inverse
        self.sample_images = torch.compile(net._sample) if self.compile else net._sample
        with torch.no_grad():
            for module in net.modules():
                if hasattr(module, "compute_K_inv"):
                    module.compute_K_inv()

    def training(self, parts: list[Tensor]) -> None:
        self.network.train()
        for part in parts:
            loss = self.loss(part).mean() / len(parts)
            loss.detach().cpu()
            loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.general["GRAD_CLIP"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for source, target in zip(self.network.parameters(), self.average.parameters()):
                target.copy_(target.lerp(source, EMA_WEIGHT))

    @torch.no_grad()
    def sampling(self, count: int) -> Tensor:
        self.network.eval()
        return self.sample_images(count, 0.8).cpu()

    @torch.no_grad()
    def encoding(self, images: Tensor) -> list[Tensor]:
        self.network.eval()
        return self.inverse(images)[0]


class Ours:
    """The same of hflow_fast, in one of MODES or several, joined by "+"."""

    def __init__(self, model: HFlow, config: Mapping[str, Any], mode: str, groups: int = 1) -> None:
        modes = mode.split("+")
        self.model = model
        if {"channels_last", "bf16"} & set(modes):
            precision = "bf16" if "bf16" in modes else "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
            model.set_precision(precision, channels_last=True)
        self.plain, self.merge = "plain" in modes, "merge" in modes
        self.noise = Noise([None] * groups) if self.merge else True
        set_recompute(self.model, "recompute" in modes)
        self.general = TrainConfig.from_config(config).general
        self.optimizer = build_optimizer(model.parameter_groups(), self.general)
        self.average = copy.deepcopy(model).requires_grad_(False)
        compiled = "compile" in modes
        self.loss = torch.compile(model.loss) if compiled else model.loss
        self.encode = torch.compile(model.encode) if compiled else model.encode
        self.sample = torch.compile(model.sample) if compiled else model.sample
        graphs = "graph" in modes and next(model.parameters()).device.type == "cuda"
        self.replay: Replay[Tensor] = Replay(cuda_recorder if graphs else None, name="training", required=True)
        if "graph" in modes:
            self.encode = replayed(model, model.encode)
            self.decode = replayed(model, lambda *latents: model.decode(latents)[0])
            self.sample = self._sample_from_graph

    def training(self, parts: list[Tensor]) -> None:
        self.model.train()
        if self.merge:
            parts = [torch.cat(parts)]
        self.replay.run(self._work, parts, self.model.launch_choices(),
                        lambda: [*self.model.parameters(), *self.average.parameters()])  # fmt: skip

    def _work(self, parts: Sequence[Tensor]) -> Generator[Callable[[], object], None, Tensor]:
        """A step in the legs of hflow_fast._replay; in any mode but graph it is simply done."""
        total = torch.zeros((), device=parts[0].device)
        with contextlib.nullcontext() if self.plain else self.model.prepared():
            for part in parts:
                yield lambda: None
                loss = self.loss(part, self.noise).mean() / len(parts)
                loss.backward()
                total += loss.detach()
        clip_and_step(self.optimizer, total, self.general.grad_clip)
        update_average(self.average, self.model, EMA_WEIGHT)
        return total

    @torch.no_grad()
    def sampling(self, count: int) -> Tensor:
        self.model.eval()
        return self.sample(count, 0.8).cpu()

    def _sample_from_graph(self, count: int, std: float) -> Tensor:
        device, stds = next(self.model.parameters()).device, self.model.latent_stds(std)
        return self.decode(*(torch.randn(count, *shape, device=device) * scale
                             for shape, scale in zip(self.model.latent_shapes, stds)))  # fmt: skip

    @torch.no_grad()
    def encoding(self, images: Tensor) -> list[Tensor]:
        self.model.eval()
        return self.encode(images)[0]


def build_pair(options: argparse.Namespace) -> tuple[Original, HFlow]:
    """Both with the same weights: initialised from data, and moved away from zeros and identities."""
    torch.manual_seed(options.seed)
    original = Original(options.original, options.settings, options.device)
    with torch.no_grad():
        for parameter in original.network.parameters():
            if parameter.requires_grad:  # its masks are parameters, too
                parameter.add_(0.02 * torch.randn_like(parameter))
        original.network.loss(images(options, 4 * options.batch))
    model = HFlow.from_original(options.settings, original.network.state_dict()).to(options.device)
    return original, model


def images(options: argparse.Namespace, count: int) -> Tensor:
    """Smooth random images in [-0.5, 0.5]."""
    resolution = options.settings["MODEL_PARAMETERS"]["RESOLUTIONS"][0]
    return smooth_images(count, resolution, 8, options.device)


def compare(original: Original, model: HFlow, x: Tensor) -> dict[str, float]:
    """Relative differences of the losses, and of the gradient of the parameter where it is largest; in float64.

    In float32 both round, by 1e-3 of a gradient with weights as wild as these, which would hide a wrong one.
    """
    with zero_noise(), float64_by_default():
        theirs = copy.deepcopy(original.network).double().train()
        mine = copy.deepcopy(model).double().train()
        losses = [theirs.loss(x.double()).flatten()]
        losses[0].mean().backward()
        with mine.prepared():
            losses.append(mine.loss(x.double()))
            losses[1].mean().backward()
    gradients = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                 for name, parameter in theirs.named_parameters()}  # fmt: skip
    expected = {name: torch.stack([gradients[source] for source in ([sources] if isinstance(sources, str) else sources)])
                for name, sources in original_names(mine).items()}  # fmt: skip
    found = {name: mine.get_parameter(name).grad.view_as(gradient) for name, gradient in expected.items()}
    worst, difference = worst_gradient(found, expected, typical_norm(gradients.values()))
    theirs, mine = (loss.detach() for loss in losses)
    result = {"loss": float(((mine - theirs).abs() / theirs.abs()).max()), "gradient": difference}
    if not max(result.values()) <= TOLERANCE:
        raise SystemExit(f"vs_original: the two differ: losses by {result['loss']:.2g}, the gradient of {worst} by "
                         f"{result['gradient']:.2g}; times of different functions say nothing.")
    return result


def zero_noise() -> Any:
    return mock.patch.object(torch, "randn_like", torch.zeros_like)


def peak_memory(side: str, options: argparse.Namespace) -> float:
    """MiB at the peak of two training steps of one side, in a process of its own."""
    command = [sys.executable, __file__, "--original", options.original, "--config", options.config, "--batch",
               options.batch, "--groups", options.groups, "--device", options.device, "--precision", options.precision,
               "--memory-of", side]  # fmt: skip
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"vs_original: measuring the memory of {side} failed:\n{output.stderr}")
    return float(json.loads(output.stdout.splitlines()[-1]))


def own_memory(side: str, options: argparse.Namespace) -> float:
    keep_or_return_memory(side)
    before = 0.0 if options.device.type == "cuda" else resident("VmRSS")
    if side == "original":
        runner = Original(options.original, options.settings, options.device)
        with torch.no_grad():
            runner.network.loss(images(options, options.batch))
        runner.ready()
    else:
        model = HFlow.from_config(options.settings).to(options.device)
        model.initialize(images(options, options.batch))
        runner = Ours(model, options.settings, side, options.groups)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + 2 if "graph" in side else 2):
        runner.training(parts_of(options))
    gc.collect()
    return torch.cuda.max_memory_allocated() / 2**20 if options.device.type == "cuda" else resident("VmHWM") - before


def parts_of(options: argparse.Namespace) -> list[Tensor]:
    return [images(options, options.batch) for _ in range(options.groups)]


def measure(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """The differences, and for each work the quantiles of every side: seconds, or MiB. Saves a GPU's activity."""
    original, model = build_pair(options)
    differences = compare(original, model, images(options, 2))
    print("agree: losses to {loss:.1e}, every gradient to {gradient:.1e}".format(**differences), flush=True)
    sides: dict[str, Original | Ours] = {"original": original}
    if options.compile:
        compiled = Original(options.original, options.settings, options.device, compile=True)
        compiled.network.load_state_dict(original.network.state_dict())
        sides["original compiled"] = compiled
    for side in sides.values():
        side.ready()
    sides |= {mode: Ours(copy.deepcopy(model), options.settings, mode, options.groups) for mode in options.modes}
    del model
    results = {}
    parts, x = parts_of(options), images(options, max(2, options.batch))  # one image has no std in the original
    for work in options.only:
        if work == "activity":
            if options.device.type == "cuda":
                save_activity(options, {name: device_activity(lambda side=side: side.training(parts))
                                        for name, side in sides.items()})  # fmt: skip
            continue
        if work == "memory":
            names = ["original", *(mode for mode in options.modes)]
            results[work] = {name: [peak_memory(name, options)] * len(QUANTILES) for name in names}
        else:
            argument = {"training": parts, "sampling": options.batch, "encoding": x}[work]
            warm_up = WARM_UP + 2 if options.device.type == "cuda" else 1
            times = time_in_turn({name: lambda name=name: turn(name, sides[name], work, argument) for name in sides},
                                 options.device, options.repeats, warm_up, settle=work != "training")  # fmt: skip
            results[work] = {name: quantiles(values) for name, values in times.items()}
        report(work, results[work])
    if options.predict:
        import predict  # beside this file: only where this is the program

        known = {name: side for name, side in sides.items() if name in ("original", "plain", "prepared")}
        works, _ = predict.works_of(known, x, options.groups)
        predict.print_prediction(options.config, works, len(x))
    return differences, results


def turn(name: str, side: Original | Ours, work: str, argument: Any) -> None:
    keep_or_return_memory(name)
    getattr(side, work)(argument)


def keep_or_return_memory(side: str) -> None:
    """As the program that the side stands for does with what it frees."""
    keep_freed_memory(not side.startswith("original") and "recompute" not in side)


def report(work: str, sides: Mapping[str, list[float]]) -> None:
    unit, digits = ("MiB", 0) if work == "memory" else ("s", 3)
    for name, (low, middle, high) in sides.items():
        print(f"{work:<9} {name:<18} {middle:10.{digits}f} {unit} ({low:.{digits}f}–{high:.{digits}f})   "
              f"original/this {sides['original'][1] / middle:5.2f}", flush=True)  # fmt: skip


def save_activity(options: argparse.Namespace, activities: Mapping[str, Activity]) -> None:
    """Of one training step: shown, and one line per side."""
    rows = []
    for name, activity in activities.items():
        print(f"activity  {name:<18} busy {activity.busy:6.1%}, {activity.kernels} kernels in {activity.kernel_ms:.1f} ms, "
              f"the host waits {activity.waits} times", flush=True)  # fmt: skip
        rows.append(columns(options, name) | {"side": name, "busy": f"{activity.busy:.4f}", "kernels": activity.kernels,
                                              "kernel_ms": f"{activity.kernel_ms:.3f}", "waits": activity.waits})
    if not options.dry_run:
        append_csv(options.results / "activity.csv", [row | provenance(options.device) for row in rows])


def columns(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """What was measured, in every file."""
    return {"config": options.config, "batch": options.batch, "groups": options.groups,
            "precision": "bf16" if "bf16" in side else options.precision}


def save(options: argparse.Namespace, differences: Mapping[str, float], results: Mapping[str, Any]) -> None:
    """One line per work and side."""
    where = provenance(options.device)
    rows = [
        {**columns(options, name), "work": work, "side": name, "unit": "MiB" if work == "memory" else "s",
         **{f"q{q}": f"{value:.4f}" for q, value in zip(QUANTILES, values)},
         "original_over_this": f"{sides['original'][1] / values[1]:.3f}", "repeats": options.repeats,
         **{f"{what}_difference": f"{value:.2e}" for what, value in differences.items()}, **where}
        for work, sides in results.items() for name, values in sides.items()
    ]  # fmt: skip
    append_csv(options.results / "vs_original.csv", rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            chosen = text.split(",")
            if not set(text.replace("+", ",").split(",")) <= set(allowed):
                raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}, separated by commas")
            return chosen

        return read

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="checkout of timoneh/hflow")
    parser.add_argument("--config", default="A-128", help="preset or JSON file")
    parser.add_argument("--batch", type=int, default=4, help="images of a micro-batch")
    parser.add_argument("--groups", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--only", type=names(WORKS), default=list(WORKS), help=f"of {', '.join(WORKS)}")
    parser.add_argument("--modes", type=names(MODES), default=DEFAULT_MODES,
                        help=f"of {', '.join(MODES)}, or several of these joined by +")
    parser.add_argument("--compile", action="store_true", help="also the original under torch.compile (slow)")
    parser.add_argument("--repeats", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(device))
    parser.add_argument("--precision", choices=("tf32", "fp32"), help="on a GPU; default tf32 there, fp32 elsewhere")
    parser.add_argument("--threads", type=int, help="of torch on the processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--predict", action="store_true", help="last, print what to expect of GPUs not at hand")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.original / "hflow" / "network.py").is_file():
        parser.error(f"--original {options.original}: no hflow/network.py; clone https://github.com/timoneh/hflow")
    options.settings = load_config(options.config)
    options.precision = options.precision or ("tf32" if options.device.type == "cuda" else "fp32")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    torch.backends.cudnn.benchmark = True  # as the original sets it; both sides have fixed shapes
    if options.memory_of:
        print(json.dumps(own_memory(options.memory_of, options)))
        return
    where = provenance(options.device)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, {options.config}, batch "
          f"{options.batch} × {options.groups}, {options.precision}")  # fmt: skip
    differences, results = measure(options)
    if not options.dry_run:
        save(options, differences, results)


if __name__ == "__main__":
    main()
