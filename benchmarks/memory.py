"""Memory and time of a training pass, with activations stored and recomputed, and with passes merged.

python benchmarks/memory.py [--configs A-256,A-128,demo] [--batch 1] [--merge 1,4] [--repeats 3] [--device cuda]

A pass is forward and backward of --batch images times what is merged, with weights prepared, as the trainer does it.

- kept: what its graph holds when the forward pass ends, parameters left out.
- peak: the most that its forward and backward pass allocate at a time, with the effective weights and their gradients,
  but not the parameters, which are there anyway.
- time: the settings take turns --repeats times; the ratio to storing of each turn, and their median, per image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hflow_fast._memory import SavedBytes, peak_bytes
from hflow_fast.bench.results import append_csv, provenance
from hflow_fast.models import HFlow, Noise
from hflow_fast.nn import set_recompute

RESULTS = Path(__file__).parent / "results" / "model"
MIB = 2**20


def run(model: HFlow, x: Tensor, setting: tuple[str, int]) -> None:
    memory, merged = setting
    set_recompute(model, memory == "recompute")
    with model.prepared():
        model.loss(x, Noise((None,) * merged)).mean().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def kept_bytes(model: HFlow, x: Tensor, setting: tuple[str, int]) -> int:
    memory, merged = setting
    set_recompute(model, memory == "recompute")
    with model.prepared(), SavedBytes() as kept:
        loss = model.loss(x, Noise((None,) * merged))
    total = kept.total
    del loss
    return total


def measure(config: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = HFlow.from_config(config).to(options.device).train()
    count, resolution = max(options.merge) * options.batch, model.resolution
    x = torch.rand(count, 3, resolution, resolution, device=options.device) - 0.5
    model.initialize(x[:2] if len(x) > 1 else torch.cat([x, x.flip(-1)]))
    settings = [(memory, merged) for merged in options.merge for memory in ("store", "recompute")]
    rows, times = [], {setting: [] for setting in settings}
    for setting in settings:
        images = x[:options.batch * setting[1]]
        run(model, images, setting)  # gradients are there from now on
        rows.append({"config": config, "batch": options.batch, "memory": setting[0], "merged": setting[1],
                     "kept_mib": kept_bytes(model, images, setting) / MIB,
                     "peak_mib": peak_bytes(lambda: run(model, images, setting), options.device) / MIB})  # fmt: skip
    for _ in range(options.repeats):
        for setting in settings:
            begin = time.perf_counter()
            run(model, x[:options.batch * setting[1]], setting)
            times[setting].append((time.perf_counter() - begin) / (options.batch * setting[1]))
    first = times[settings[0]]
    for row, setting in zip(rows, settings):
        row["seconds_per_image"] = statistics.median(times[setting])
        row["time_ratio"] = statistics.median(own / base for own, base in zip(times[setting], first))
        print("{config:<6} batch {batch} × {merged}  {memory:<9}  kept {kept_mib:7.1f} MiB  peak {peak_mib:7.1f} MiB  "
              "{seconds_per_image:7.3f} s per image  {time_ratio:5.2f} × the first".format(**row), flush=True)  # fmt: skip
    return rows


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    where = provenance(options.device)
    rows = [{key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} | where
            for row in rows]  # fmt: skip
    append_csv(options.results / "memory.csv", rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=lambda text: text.split(","), default=["A-256", "A-128", "demo"])
    parser.add_argument("--batch", type=int, default=1, help="images of a pass before merging")
    parser.add_argument("--merge", type=lambda text: [int(part) for part in text.split(",")], default=[1],
                        help="passes run as one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    where = provenance(options.device)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    rows = [row for config in options.configs for row in measure(config, options)]
    if not options.dry_run:
        save(rows, options)


if __name__ == "__main__":
    main()
