"""A zip of small patches of photographs, for experiments that real pixels and minutes have to be enough for.

    pip install scikit-image scikit-learn matplotlib      # any of them; they come with a few photographs
    python scripts/photo_patches.py .cache/patches.zip
    hflow-fast dataset .cache/patches.zip .cache/patches --resolution 8

Takes the photographs of installed packages, or those in the folders given with --photos. Each is reduced by 2, which
leaves little of JPEG's blocks and the sensor's noise, and cut into tiles of 32 × 32 pixels. Every tenth tile, by a
hash, is held out, so that no pixel is on both sides. Patches of held-out tiles do not overlap; those for training do, by
half.
A patch's name begins with its tile's hash: patches in the order of names are in a random order of tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image

from hflow_fast._files import replacing

PHOTOGRAPHS = {
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
REDUCTION = 2
TILE = 32
HELD_OUT = 10
"""One tile in so many."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="zip to make")
    parser.add_argument("--size", type=int, default=8, choices=[4, 8, 16, 32], help="side of a patch in pixels")
    parser.add_argument("--photos", type=Path, nargs="+", help="folders of photographs, instead of those of packages")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} already exists")
    files = list(photographs(options.photos))
    if not files:
        parser.error("no photographs: install scikit-image, scikit-learn or matplotlib, or give folders with --photos")
    counts = {"train": 0, "held_out": 0}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in files:
            pixels = reduced(file)
            print(f"{file.name}: {pixels.shape[1]} × {pixels.shape[0]} pixels")
            for part, name, patch in patches(pixels, file.stem, options.size):
                counts[part] += 1
                data = io.BytesIO()
                Image.fromarray(patch).save(data, format="png")
                archive.writestr(zipfile.ZipInfo(f"{part}/{name}.png"), data.getvalue())
    print(f"{options.out}: {counts['train']:,} training and {counts['held_out']:,} held-out patches of "
          f"{options.size} × {options.size} pixels")
    return 0


def photographs(folders: list[Path] | None) -> Iterator[Path]:
    if folders:
        for folder in folders:
            yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            yield from (path for name in names if (path := Path(root) / name).is_file())


def reduced(file: Path) -> np.ndarray:
    """(H, W, 3), uint8: the mean of squares of 2 × 2 pixels."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB").reduce(REDUCTION))


def patches(pixels: np.ndarray, photo: str, size: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Part, name and pixels of every patch."""
    for top in range(0, pixels.shape[0] - TILE + 1, TILE):
        for left in range(0, pixels.shape[1] - TILE + 1, TILE):
            digest = hashlib.sha256(f"{photo} {top} {left}".encode()).hexdigest()
            held_out = int(digest[:8], 16) % HELD_OUT == 0
            step = size if held_out else size // 2
            for y in range(top, top + TILE - size + 1, step):
                for x in range(left, left + TILE - size + 1, step):
                    yield ("held_out" if held_out else "train", f"{digest[8:16]}_{photo}_{y:04d}_{x:04d}",
                           pixels[y:y + size, x:x + size])


if __name__ == "__main__":
    sys.exit(main())
