"""Make ``noto_emoji_64.zip`` from the colour bitmaps of the Noto Color Emoji font.

    apt-get install fonts-noto-color-emoji && pip install fonttools pillow numpy
    python make_noto_emoji.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf noto_emoji_64.zip

The font holds one 136 × 128 bitmap per emoji (table CBDT). Each is laid on white, cut to its inner 128 × 128 pixels
(the margins are empty) and reduced to 64 × 64 with Lanczos. National flags, skin tones, bare hair parts and the digits,
``#`` and ``*`` as plain text are left out. Pixels and split depend only on the font; the zip's bytes on zlib as well.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

__all__ = ["emoji_bitmaps", "look_alike_groups", "main"]

Sequence = tuple[int, ...]  # the code points of one emoji

PEOPLE = {0x1F468, 0x1F469, 0x1F9D1}
# Shared by unrelated emoji, so not a sign of kinship: joiner, gender signs, the arrow of "facing right", people.
LINKS = {0x200D, 0x2640, 0x2642, 0x27A1} | PEOPLE
NEVER_IN = set(range(0x1F1E6, 0x1F200)) | set(range(0x1F3FB, 0x1F400))  # flags, skin tones
NEVER_ALONE = set(range(0x80)) | set(range(0x1F9B0, 0x1F9B4))  # digits, # and * as text; hair parts
FIRST_PRIVATE = 0xE0000  # tags (regional flags) and private-use duplicates begin here
FONT_DATE = (2023, 11, 29, 0, 0, 0)  # given to every file, so that the same font gives the same zip
LOOK_ALIKE_RMS = 22.0  # of 255, at 32 × 32: clock faces fall below it, nearly all smileys do not


def emoji_bitmaps(font_path: Path) -> dict[Sequence, bytes]:
    """PNG bytes of every kept emoji, keyed by its code points, in code point order."""
    font = TTFont(font_path)
    bitmaps = font["CBDT"].strikeData[0]
    code_point = {glyph: code for code, glyph in font.getBestCmap().items()}
    sequences: dict[str, list[Sequence]] = {glyph: [(code,)] for glyph, code in code_point.items()}
    for first, ligatures in font["GSUB"].table.LookupList.Lookup[0].SubTable[0].ligatures.items():
        for ligature in ligatures:
            parts = (code_point[first], *(code_point[part] for part in ligature.Component))
            sequences.setdefault(ligature.LigGlyph, []).append(parts)

    found = {}
    for glyph, candidates in sequences.items():
        kept = [s for s in candidates if glyph in bitmaps and is_kept(s)]
        if kept:  # the font lists joined emoji in both directions: name them person first
            found[max(kept, key=lambda s: (s[0] in PEOPLE, s))] = bitmaps[glyph].imageData
    return dict(sorted(found.items()))


def is_kept(sequence: Sequence) -> bool:
    alone = len(sequence) == 1 and sequence[0] in NEVER_ALONE
    return not alone and max(sequence) < FIRST_PRIVATE and not NEVER_IN.intersection(sequence)


def render(png: bytes) -> Image.Image:
    bitmap = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", bitmap.size, "white")
    page.alpha_composite(bitmap)
    return page.convert("RGB").crop((4, 0, 132, 128)).resize((64, 64), Image.Resampling.LANCZOS)


def look_alike_groups(images: dict[Sequence, Image.Image]) -> dict[Sequence, Sequence]:
    """Each emoji's group, named by its smallest member: emoji that share a code point or look alike are together."""
    parent = {sequence: sequence for sequence in images}

    def root(sequence: Sequence) -> Sequence:
        while parent[sequence] != sequence:
            sequence = parent[sequence]
        return sequence

    def join(a: Sequence, b: Sequence) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    owner: dict[int, Sequence] = {}
    for sequence in images:
        for part in set(sequence) - LINKS:
            join(sequence, owner.setdefault(part, sequence))

    names = list(images)
    pixels = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BOX)) for image in images.values()])
    flat = pixels.reshape(len(names), -1).astype(np.float64)
    for i, row in enumerate(flat):
        distance = np.sqrt(np.mean((flat[i + 1 :] - row) ** 2, axis=1))
        for j in np.flatnonzero(distance < LOOK_ALIKE_RMS):
            join(names[i], names[i + 1 + j])
    return {sequence: root(sequence) for sequence in images}


def is_held_out(group: Sequence) -> bool:
    digest = hashlib.sha256(file_stem(group).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def file_stem(sequence: Sequence) -> str:
    return "_".join(f"{part:04x}" for part in sequence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    images = {sequence: render(png) for sequence, png in emoji_bitmaps(arguments.font).items()}
    groups = look_alike_groups(images)
    counts = {"train": 0, "held_out": 0}
    with zipfile.ZipFile(arguments.out, "x", zipfile.ZIP_STORED) as archive:
        for sequence, image in images.items():
            folder = "held_out" if is_held_out(groups[sequence]) else "train"
            counts[folder] += 1
            png = io.BytesIO()
            image.save(png, "PNG", optimize=True)
            name = f"{folder}/{file_stem(sequence)}.png"
            archive.writestr(zipfile.ZipInfo(name, FONT_DATE), png.getvalue())
    print(f"{counts['train']} train, {counts['held_out']} held out, {len(set(groups.values()))} groups")


if __name__ == "__main__":
    main()
