"""A table of attributes of the emoji in datasets/noto_emoji_64.zip, by their Unicode names and their colours.

    python scripts/emoji_attributes.py datasets/noto_emoji_64.zip .cache/emoji.csv
    hflow-fast dataset datasets/noto_emoji_64.zip .cache/emoji --resolution 32 --labels .cache/emoji.csv

Attributes: face, hand, heart, animal and square are words of the name of the first code point; red, blue and yellow say
which colour prevails among the pixels that are not white; large, that few are.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = {
    "face": r"\bFACE\b", "hand": r"\b(HAND|HANDS|FIST|FINGER)\b", "heart": r"\bHEARTS?\b",
    "animal": r"\b(DOG|CAT|MONKEY|BEAR|BIRD|FISH|WHALE|HORSE|COW|PIG|MOUSE|RABBIT|SNAKE|TURTLE|TIGER|LION|CHICKEN)\b",
    "square": r"\b(SQUARED?|KEYCAP)\b",
}
WHITE = 40  # of 255: pixels closer to white are paper


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="datasets/noto_emoji_64.zip")
    parser.add_argument("out", type=Path, help="CSV file to make")
    options = parser.parse_args()
    with zipfile.ZipFile(options.images) as archive:
        rows = [(name, attributes(name, archive.read(name))) for name in archive.namelist() if name.endswith(".png")]
    titles = list(rows[0][1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", *titles])
        table.writerows([name, *(int(row[title]) for title in titles)] for name, row in rows)
    print(f"{options.out}: {len(rows)} emoji; " + ", ".join(
        f"{title} {sum(row[title] for _, row in rows)}" for title in titles))
    return 0


def attributes(name: str, data: bytes) -> dict[str, bool]:
    """Of one emoji, whose file is named by its code points."""
    spelled = unicodedata.name(chr(int(Path(name).stem.split("_")[0], 16)), "")
    found = {title: re.search(pattern, spelled) is not None for title, pattern in WORDS.items()}
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(float)
    inked = pixels[(255 - pixels).max(axis=1) > WHITE]
    red, green, blue = inked.mean(axis=0) if len(inked) else (0.0, 0.0, 0.0)
    found |= {"red": red > 1.5 * max(green, blue), "blue": blue > 1.2 * max(red, green),
              "yellow": min(red, green) > 1.5 * blue}
    return found | {"large": len(inked) > 0.6 * len(pixels)}


if __name__ == "__main__":
    sys.exit(main())
