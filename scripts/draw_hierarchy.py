"""Draws docs/images/hierarchy.svg and level.svg: the model, and one of its levels, as docs/model.md explains them.

Shapes, steps and noise are read from a model, so run this again when a preset changes; a test compares. The labels
stand in the files' descriptions, too. ``--png`` writes PNGs, to look at.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterable

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hflow_fast._files import replacing
from hflow_fast.models import HFlow

__all__ = ["draw_hierarchy", "draw_level"]

PRESET = "A-128"
INK, LINE, PAPER = "#1f2933", "#52606d", "#ffffff"  # a sheet of its own: the same on light and dark pages
ENCODER, DECODER, FLOW, TARGET, LATENT, TERM = "#dbeafe", "#ffe8cc", "#d8f5dd", "#f1f3f5", "#ece5ff", "#fff5c2"

Point = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--png", action="store_true")
    arguments = parser.parse_args()
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = HFlow.from_config(PRESET)
    for name, sheet in {"hierarchy": draw_hierarchy(model), "level": draw_level(model)}.items():
        sheet.save(arguments.out / f"{name}.{'png' if arguments.png else 'svg'}")


class Sheet:
    """Boxes, arrows and labels in inches, the origin at the lower left."""

    def __init__(self, width: float, height: float) -> None:
        self.labels: list[str] = []
        self.figure = Figure((width, height), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, centre: Point, size: Point, colour: str, title: str, text: str = "") -> None:
        (x, y), (width, height) = centre, size
        self.axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=colour, edgecolor=LINE, linewidth=0.9, zorder=3))
        if not text:
            self.label(centre, title, weight="bold", zorder=4)
        else:
            lines = text.count("\n") + 1
            self.label((x, y + 0.09 * lines), title, weight="bold", zorder=4)
            self.label((x, y - 0.09), text, size=8.5, zorder=4)

    def frame(self, left: float, right: float, bottom: float, top: float) -> None:
        """A group of boxes."""
        self.axes.add_patch(FancyBboxPatch(
            (left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=0.1", facecolor="#f4f6f8",
            edgecolor=LINE, linewidth=0.9, linestyle=(0, (1.5, 2)), zorder=1))

    def label(self, point: Point, text: str, *, size: float = 9.5, colour: str = INK, **options: object) -> None:
        self.labels.append(" ".join(text.split()))
        self.axes.text(*point, text, fontsize=size, color=colour, linespacing=1.25,
                       **{"ha": "center", "va": "center", "zorder": 5} | options)

    def arrow(self, *points: Point, dashed: bool = False, head: bool = True) -> None:
        """Along straight lines; dashed where no gradient flows."""
        style = dict(color=LINE, linewidth=1.2, linestyle=(0, (3.5, 2.5)) if dashed else "-", zorder=2)
        self.axes.plot(*zip(*points), solid_joinstyle="round", **style)
        if head:
            self.axes.annotate("", points[-1], points[-2], zorder=2, arrowprops=dict(
                arrowstyle="-|>,head_width=0.22,head_length=0.42", color=LINE, linewidth=0, shrinkA=0, shrinkB=0))

    def save(self, path: Path) -> None:
        options = {"metadata": {"Date": None, "Description": " | ".join(self.labels)}} if path.suffix == ".svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": path.stem}), replacing(path) as temporary:
            self.figure.savefig(temporary, format=path.suffix[1:], dpi=130, facecolor=PAPER, **options)


def draw_hierarchy(model: HFlow) -> Sheet:
    """Image → encoders → targets → flows → latents, and the decoders going back up."""
    sheet = Sheet(11.6, 11.15)
    specs = [level.spec for level in model.levels]
    code = model.endblock.partitions
    rows = [10.2 - 2.05 * index for index in range(len(specs))]
    code_row = rows[-1] - 2.95
    gaps = [row - 1.02 for row in rows]  # encoders and decoders stand between the levels
    code_gap = code_row + 1.0
    encoders, targets, decoders, flows, latents, terms = 0.95, 2.75, 4.75, 6.7, 8.5, 10.5
    wide, narrow = (1.62, 0.62), (1.3, 0.62)

    for x, text in zip((encoders, targets, decoders, flows, latents, terms),
                       ("encoders", "targets", "decoders", "flows", "latents", "loss = Σ weight · bits/dim")):
        sheet.label((x, 10.85), text, size=10.5, colour=LINE)

    # Targets, flows, latents and terms: a row per level.
    for index, (spec, row) in enumerate(zip(specs, rows)):
        shape = _shape(spec.channels, spec.resolution)
        name = "image × 4" if spec.is_finest else f"target $y_{{{spec.resolution}}}$"
        sheet.box((targets, row), narrow, TARGET, name, shape)
        sheet.box((flows, row), wide, FLOW, f"flow {spec.resolution}", f"{len(spec.steps)} steps")
        sheet.box((latents, row), narrow, LATENT, f"$z_{{{spec.resolution}}}$", shape)
        _term(sheet, (terms, row), spec.loss_weight, spec.flow_noise is not None)
        sheet.arrow((targets + 0.65, row), (flows - 0.81, row), dashed=True)
        if spec.flow_noise is not None:
            sheet.label((targets + 0.74, row + 0.13), f"+ {spec.flow_noise:g} σ ε", size=8.5, ha="left")
    sheet.box((targets, code_row), narrow, TARGET, "code $y_1$", _shape(sum(code), 1))
    steps = " + ".join(str(len(flow.networks)) for flow in model.endblock.flows)
    sheet.box((flows, code_row), (1.62, 0.86), FLOW, "endblock",
              f"{' | '.join(map(str, code))} channels\n{steps} steps")
    sheet.box((latents, code_row), narrow, LATENT, "$z_1$", _shape(sum(code), 1))
    _term(sheet, (terms, code_row), 1.0, True)
    sheet.arrow((targets + 0.65, code_row), (flows - 0.81, code_row), dashed=True)
    sheet.label((targets + 0.74, code_row + 0.13), f"+ {_range(model.endblock.noise)} σ ε", size=8.5, ha="left")
    for row in (*rows, code_row):
        sheet.arrow((flows + 0.81, row), (latents - 0.65, row))
        sheet.arrow((latents + 0.65, row), (terms - 0.86, row))

    # Encoders, downwards.
    sheet.arrow((targets - 0.65, rows[0]), (encoders, rows[0]), (encoders, gaps[0] + 0.31))
    for index, (level, gap) in enumerate(zip(model.levels, gaps)):
        features = level.encoder.features.weight.shape[0]
        size = level.spec.resolution // level.spec.ratio
        sheet.box((encoders, gap), wide, ENCODER, f"encoder {level.spec.resolution}",
                  f"features {_shape(features, size)}")
        if level.spec.is_lowest:
            sheet.arrow((encoders, gap - 0.31), (encoders, code_gap + 0.31))
        else:
            sheet.arrow((encoders, gap - 0.31), (encoders, gaps[index + 1] + 0.31))
            sheet.arrow((encoders + 0.81, gap), (targets - 0.3, gap), (targets - 0.3, rows[index + 1] + 0.31))
    sheet.box((encoders, code_gap), wide, ENCODER, "code encoder")
    sheet.arrow((encoders + 0.81, code_gap), (targets - 0.3, code_gap), (targets - 0.3, code_row + 0.31))

    # Decoders, upwards.
    sheet.box((decoders, code_gap), wide, DECODER, "code decoder", f"canvas {_shape(sum(code), 4)}")
    sheet.arrow((targets + 0.3, code_row + 0.31), (targets + 0.3, code_gap), (decoders - 0.81, code_gap))
    sheet.label((targets + 0.37, code_gap + 0.13), f"+ {_range(model.endblock.decoder_noise)} σ ε", size=8.5, ha="left")
    sheet.arrow((decoders, code_gap + 0.31), (decoders, gaps[-1] - 0.31))
    for index, (level, gap, row) in enumerate(zip(model.levels, gaps, rows)):
        hidden = level.spec.decoder.hidden_channels
        style = ", style" if level.spec.decoder.style else ""
        sheet.box((decoders, gap), wide, DECODER, f"decoder {level.spec.resolution}{style}",
                  f"features {_shape(hidden, level.spec.resolution)}")
        sheet.arrow((decoders + 0.81, gap), (flows, gap), (flows, row - 0.31))
        if index == 0:
            sheet.label((flows + 0.1, gap + 0.12), "start, end, context", size=8.5, ha="left")
        if not level.spec.is_lowest:
            noise = f"+ {level.spec.decoder.noise:g} σ ε" if level.spec.decoder.noise else ""
            sheet.arrow((targets + 0.3, rows[index + 1] + 0.31), (targets + 0.3, gap), (decoders - 0.81, gap))
            sheet.label((targets + 0.37, gap + 0.13), noise, size=8.5, ha="left")
            sheet.arrow((decoders, gaps[index + 1] + 0.31), (decoders, gap - 0.31))
            skip = level.spec.decoder.skip_channels
            sheet.label((decoders + 0.08, gaps[index + 1] + 0.46), f"skip, {skip} ch.", size=8.5, ha="left")

    sheet.arrow((0.35, 0.33), (0.95, 0.33))
    sheet.label((1.05, 0.33), "gradients flow", ha="left")
    sheet.arrow((2.6, 0.33), (3.2, 0.33), dashed=True)
    sheet.label((3.3, 0.33), "detached: no gradient goes back", ha="left")
    sheet.label((6.25, 0.33), "Sampling: from the bottom up, flows from right to left, no encoders.", ha="left")
    return sheet


def draw_level(model: HFlow) -> Sheet:
    """The flow of one level: what runs in which pass."""
    level = model.levels[1]
    spec = level.spec
    size, steps = spec.resolution, len(spec.steps)
    target, raw = _shape(spec.channels, size), _shape(2 * spec.channels, size)
    sheet = Sheet(11.6, 5.3)
    chain, nets, bus = 1.75, 3.15, 4.75
    box = (0.92, 0.78)
    xs = dict(zip(("y", "start", "act1", "c1", "w1", "act2", "dots", "cl", "wl", "end", "z"),
                  (0.55, 1.66, 2.66, 3.86, 4.86, 5.86, 6.6, 7.34, 8.34, 9.6, 10.95)))

    sheet.box(((xs["start"] + xs["end"]) / 2, bus), (xs["end"] - xs["start"] + 0.92, 0.62), DECODER, f"decoder {size}",
              f"start and end {raw},  context {_shape(spec.context_channels, size)}")
    for left, right, text in (("start", "act1", "flow_step"), ("c1", "act2", "flow_step"), ("cl", "wl", "flow_step"),
                              ("end", "end", "coupling")):
        sheet.frame(xs[left] - 0.53, xs[right] + 0.53, chain - 0.85, chain + 0.49)
        sheet.label(((xs[left] + xs[right]) / 2, chain - 0.66), text, size=9, family="monospace")

    sheet.box((xs["y"], chain), (0.84, 0.78), TARGET, f"$y_{{{size}}}$", target)
    sheet.box((xs["z"], chain), (0.84, 0.78), LATENT, f"$z_{{{size}}}$", target)
    sheet.box((xs["start"], chain), box, FLOW, "start", "(x − t)·$e^{−s}$")
    sheet.box((xs["end"], chain), box, FLOW, "end", "(x − t)·$e^{−s}$")
    for name, number in (("act1", "1"), ("act2", "2")):
        sheet.box((xs[name], chain), box, FLOW, f"actnorm {number}", "per channel")
    for name, number in (("w1", "1"), ("wl", str(steps))):
        sheet.box((xs[name], chain), box, FLOW, f"1 × 1, {number}", "W x")
    for name, number in (("c1", "1"), ("cl", str(steps))):
        x = xs[name]
        sheet.box((x, chain), box, FLOW, f"coupling {number}", "(x − t)·$e^{−s}$")
        sheet.box((x, nets), (1.2, 0.6), FLOW, "network", f"raw {raw}")
        sheet.arrow((x, bus - 0.31), (x, nets + 0.3))
        sheet.label((x + 0.08, nets + 0.62), "context", size=8.5, ha="left")
        sheet.arrow((x, nets - 0.3), (x, chain + 0.39))
        sheet.label((x + 0.08, nets - 0.52), "s, t", size=8.5, ha="left")
        before = x - 0.6
        sheet.arrow((before, chain), (before, chain + 0.8), (x - 0.3, chain + 0.8), (x - 0.3, nets - 0.3))
        sheet.label((before - 0.07, chain + 0.72), "passive x", size=8.5, ha="right")
    for name in ("start", "end"):
        sheet.arrow((xs[name], bus - 0.31), (xs[name], chain + 0.39))
        sheet.label((xs[name] + 0.08, nets), "s, t", size=8.5, ha="left")
    names = list(xs)
    for left, right in zip(names, names[1:]):
        if "dots" in (left, right):
            continue
        half = [0.42 if name in ("y", "z") else 0.46 for name in (left, right)]
        sheet.arrow((xs[left] + half[0], chain), (xs[right] - half[1], chain), dashed=left == "y")
    sheet.label((xs["dots"], chain), "…", size=14)

    sheet.label((5.8, 0.55), "Each dotted frame is one read and one write of the flow variable, with its log-det.")
    sheet.label((5.8, 0.25), f"StepAffines folds the {steps} actnorms and {steps} matrices into {steps + 1} pairs "
                "(W, b) by lu_many, which gives their log-det, too.")
    return sheet


def _term(sheet: Sheet, centre: Point, weight: float, noisy: bool) -> None:
    """What a level adds to the loss."""
    entropy = " + H(ε)" if noisy else ""
    sheet.box(centre, (1.72, 0.62), TERM, f"weight {weight:g}", f"log p(z) + log|det|{entropy}")


def _shape(channels: int, size: int) -> str:
    return f"{channels} × {size} × {size}"


def _range(values: Iterable[float]) -> str:
    return " | ".join(dict.fromkeys(f"{value:.3g}" for value in values))


if __name__ == "__main__":
    main()
