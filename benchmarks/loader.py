"""Images per second from disk: the loader beside the memory map and beside image files, cold and warm.

python benchmarks/loader.py [--images 30000] [--resolution 256] [--folder DIR] [--device cuda] [--dry-run]

A dataset of random pixels is written to a temporary folder and removed at the end; the default takes 5.9 GB. "Cold" is
after the kernel was told to forget the file, with images in random order and none twice; "warm" is after everything
was read. The readers are

  map        indexing the memory map, one step at a time, in the training thread
  loader     hflow_fast.data.Loader, whose threads read ahead
  PNG        decoding image files of the same size, in one thread, as a loop without a dataset would

"pace" is how many images per second training takes: while a step is "computed" the training thread sleeps. Without a
pace it asks for the next step at once. "wait" is the time per step in which training has no data. Numbers are medians
with the 20 and 80 % quantiles: of the waits over the steps, of the images per second over groups of four, since what is
read ahead comes in bursts.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from hflow_fast.bench.results import provenance
from hflow_fast.data import Batches, ImageDataset, Images, Loader
from hflow_fast.data.dataset import Manifest, Recipe
from hflow_fast.data.decode import decode_image

RESULTS = Path(__file__).parent / "results" / "data"
PACES = (None, 50, 200, 500)
PNG_FILES = 256
GROUP = 4
QUANTILES = (20, 50, 80)
COLUMNS = ("reader", "state", "images", "resolution", "images_per_step", "micro_batch", "pace", "steps",
           *(f"{name}_q{q}" for name in ("images_per_s", "wait_ms") for q in QUANTILES), "target", "disk")  # fmt: skip

Steps = Iterator[object]
"""``next`` returns when one step's images are there."""


def write_dataset(folder: Path, count: int, resolution: int) -> None:
    """Random pixels, which no file system can store in less than their size."""
    folder.mkdir()
    with open(folder / "images.npy", "wb") as file:
        shape = (count, resolution, resolution, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        random = np.random.default_rng(0)
        for _ in tqdm(range(count), desc="writing", unit=" images", disable=None):
            file.write(random.bytes(resolution * resolution * 3))
        file.flush()
        os.fsync(file.fileno())
    recipe = Recipe(source_fingerprint="", resolution=resolution, split="content", held_out_fraction=0.05, seed=0)
    manifest = Manifest(recipe=recipe, source="", sha256="", names=[str(i) for i in range(count)],
                        held_out=list(range(0, count, 20)), skipped=[])
    (folder / "dataset.json").write_text(manifest.model_dump_json())


def write_files(folder: Path, count: int, resolution: int) -> None:
    """PNG files of about the size of photographs': smooth shapes with a little noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((resolution, resolution), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-3, 4, smooth.shape)
        with open(folder / f"{number}.png", "wb") as file:
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())  # what is not on the disk yet cannot be forgotten


def forget(*files: Path) -> None:
    """Takes the files out of the page cache; whoever has mapped them must have let go."""
    gc.collect()
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_up(path: Path) -> None:
    """Reads a file once."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass


def from_map(images: Images, options: argparse.Namespace) -> Steps:
    for index in Batches(len(images), options.images_per_step):
        yield [part.to(options.device) for part in images[index].split(options.micro_batch)]


def from_loader(images: Images, options: argparse.Namespace) -> Steps:
    batches = Batches(len(images), options.images_per_step)
    return Loader(images, batches, options.micro_batch, device=options.device)


def from_files(folder: Path, options: argparse.Namespace) -> Steps:
    paths = sorted(folder.iterdir())
    for index in Batches(len(paths), options.images_per_step):
        pixels = [decode_image(paths[i].read_bytes(), options.resolution) for i in index.tolist()]
        yield torch.from_numpy(np.stack(pixels)).to(options.device)


def measure(steps: Steps, count: int, pace: float | None, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds per step, and of these the seconds of waiting for data, of ``count`` steps or ``options.seconds``."""
    whole, waits = [], []
    end = time.perf_counter() + options.seconds
    while len(whole) < count and (time.perf_counter() < end or len(whole) < 3):
        start = time.perf_counter()
        next(steps)
        waits.append(time.perf_counter() - start)
        if pace is not None:
            time.sleep(options.images_per_step / pace)
        whole.append(time.perf_counter() - start)
    if isinstance(steps, Loader):
        steps.close()
    return whole, waits


def cases(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    dataset, files = folder / "dataset", folder / "files"
    pixels, pictures = dataset / "images.npy", sorted(files.iterdir())
    per_epoch = (options.images - len(range(0, options.images, 20))) // options.images_per_step
    readers: dict[str, Callable[[], Steps]] = {
        "map": lambda: from_map(ImageDataset.open(dataset).train, options),
        "loader": lambda: from_loader(ImageDataset.open(dataset).train, options),
        "PNG": lambda: from_files(files, options),
    }
    for state in ("cold", "warm"):
        for pace, (reader, make) in itertools.product(PACES, readers.items()):
            if state == "cold":
                forget(pixels, *pictures)
            elif reader != "PNG":
                warm_up(pixels)
            most = len(pictures) // options.images_per_step if reader == "PNG" else per_epoch
            whole, waits = measure(make(), most, pace, options)
            groups = [whole[i : i + GROUP] for i in range(0, len(whole) - len(whole) % GROUP, GROUP)] or [whole]
            rates = np.percentile([len(group) * options.images_per_step / sum(group) for group in groups], QUANTILES)
            yield {
                "reader": reader, "state": state, "images": len(pictures) if reader == "PNG" else options.images,
                "resolution": options.resolution, "images_per_step": options.images_per_step,
                "micro_batch": options.micro_batch, "pace": "" if pace is None else pace, "steps": len(whole),
                **{f"images_per_s_q{q}": f"{value:.1f}" for q, value in zip(QUANTILES, rates)},
                **{f"wait_ms_q{q}": f"{value * 1e3:.3f}" for q, value in zip(QUANTILES, np.percentile(waits, QUANTILES))},
            }  # fmt: skip


def disk_of(folder: Path) -> str:
    """File system and device that a folder is on."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, mount, kind, *_ = line.split()
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, f"{kind} on {device}")
    return best[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images-per-step", type=int, default=16, help="SAMPLES_PER_GRAD_EVAL")
    parser.add_argument("--micro-batch", type=int, default=4, help="BATCH_SIZE")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, at most")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary folder by default")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where the images are wanted")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if options.images * 0.95 < options.images_per_step:
        parser.error("--images: too few for one step")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="hflow-loader-") as name:
        folder = Path(name)
        size, free = options.images * options.resolution**2 * 3, shutil.disk_usage(folder).free
        if size > 0.9 * free:
            sys.exit(f"{folder}: {free / 1e9:.1f} GB are free and {size / 1e9:.1f} GB needed; "
                     "give another --folder or fewer --images.")
        write_dataset(folder / "dataset", options.images, options.resolution)
        write_files(folder / "files", min(PNG_FILES, options.images), options.resolution)
        common = {"target": options.device.type, "disk": disk_of(folder), **provenance(options.device)}
        print(f"{common['device']}, {common['disk']}, {options.images} images of {options.resolution} px, "
              f"{size / 1e9:.2f} GB, {options.images_per_step} images per step")
        print(f"{'state':<5} {'pace':>6}  {'reader':<7} {'images/s':>8} {'(20–80 %)':>17} {'wait per step, ms':>18}")
        rows = []
        for row in cases(options, folder):
            rates = [float(row[f"images_per_s_q{q}"]) for q in QUANTILES]
            print(f"{row['state']:<5} {row['pace'] or 'none':>6}  {row['reader']:<7} {rates[1]:8.0f} "
                  f"{f'({rates[0]:.0f}–{rates[2]:.0f})':>17} {float(row['wait_ms_q50']):18.2f}", flush=True)
            rows.append(row | common)
    if not options.dry_run:
        path = options.results / "loader.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *provenance(options.device)], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
