"""One Glow, built with each library as its users build it, for benchmarks/dropin.py.

L levels of squeeze, K steps and a split that gives half of the channels away; a step is an affine coupling, a 1 × 1
convolution and whatever normalization the library puts beside them. Networks are 3 × 3, 1 × 1 and 3 × 3 convolutions of
a given width, with ReLUs between them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hflow_fast.models import Glow
from hflow_fast.nn import ActNorm, AffineCoupling, CouplingSpec, InvConv1x1, Reversible, Sequential, Squeeze

__all__ = ["BUILDERS", "Chain", "Shape", "Subject", "build_glow", "import_glow_pytorch", "is_installed",
           "take_networks_out", "version_of"]  # fmt: skip

PACKAGES = {"normflows": "normflows", "freia": "FrEIA", "nflows": "nflows"}
"""Libraries that are installed, by the name that Python imports."""
NETWORKS = ("param_map", "subnet", "transform_net", "net")
"""What the libraries' couplings call their networks."""
GLOW_PYTORCH = "glow_pytorch_model"


@dataclass(frozen=True)
class Shape:
    """Which Glow."""

    levels: int = 3
    depth: int = 16
    resolution: int = 32
    batch: int = 16
    width: int | None = 512
    """Of the coupling networks. None: the flow part alone, to be left of a model by :func:`take_networks_out`."""

    def stages(self) -> Iterator[tuple[int, int]]:
        """Channels and resolution of the steps of each level, finest first."""
        channels, resolution = 3, self.resolution
        for _ in range(self.levels):
            channels, resolution = 4 * channels, resolution // 2
            yield channels, resolution
            channels //= 2

    def net(self, inputs: int, outputs: int) -> nn.Module:
        width = self.width or 1
        return nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, outputs, 3, padding=1),
        )  # fmt: skip


class FixedRaw(nn.Module):
    """In place of a coupling network: a copy of a tensor of raw parameters, whatever the input.

    The tensor is learned, so that the coupling has to find its gradient. A copy, as one of the libraries writes into it.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.1 * torch.randn(shape))

    def forward(self, passive: Tensor, context: Tensor | None = None) -> Tensor:
        return self.raw.clone()


class Subject(NamedTuple):
    """A model, and what is done with it."""

    model: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]
    """Of images (B, 3, R, R): mean negative log-likelihood in nats."""
    sample: Callable[[nn.Module, int], Tensor]


def build_normflows(shape: Shape) -> Subject:
    import normflows

    levels, latents = [], []
    for level, (channels, resolution) in reversed(list(enumerate(shape.stages()))):  # from latents to images
        blocks = [normflows.flows.GlowBlock(channels, shape.width or 1) for _ in range(shape.depth)]
        levels.append([*blocks, normflows.flows.Squeeze()])
        last = level == shape.levels - 1
        latents.append(normflows.distributions.DiagGaussian((channels if last else channels // 2, resolution, resolution)))
    merges = [normflows.flows.Merge() for _ in levels[1:]]
    model = normflows.MultiscaleFlow(latents, levels, merges, class_cond=False)
    return Subject(model, lambda model, x: model.forward_kld(x), lambda model, count: model.sample(count)[0])


def build_freia(shape: Shape) -> Subject:
    from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
    from FrEIA.modules import AllInOneBlock, IRevNetDownsampling, Split

    nodes, outputs = [InputNode(3, shape.resolution, shape.resolution)], []
    for level in range(shape.levels):
        nodes.append(Node(nodes[-1], IRevNetDownsampling, {}))
        for _ in range(shape.depth):
            nodes.append(Node(nodes[-1], AllInOneBlock, {"subnet_constructor": shape.net, "permute_soft": True}))
        if level < shape.levels - 1:
            nodes.append(Node(nodes[-1], Split, {}))
            outputs.append(OutputNode(nodes[-1].out1))
    model = GraphINN([*nodes, *outputs, OutputNode(nodes[-1])])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        latents, log_det = model(x)
        latents = latents if isinstance(latents, tuple) else (latents,)
        return -(log_det + sum(log_normal(latent) for latent in latents)).mean()

    def sample(model: nn.Module, count: int) -> Tensor:
        return model([noise(model, count, *dims) for dims in model.global_out_shapes], rev=True)[0]

    return Subject(model, loss, sample)


def build_nflows(shape: Shape) -> Subject:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (ActNorm, AffineCouplingTransform, CompositeTransform, MultiscaleCompositeTransform,
                                   OneByOneConvolution, SqueezeTransform)  # fmt: skip
    from nflows.utils.torchutils import create_mid_split_binary_mask

    transform = MultiscaleCompositeTransform(shape.levels)
    for channels, resolution in shape.stages():
        steps = [SqueezeTransform()]
        for _ in range(shape.depth):
            steps += [ActNorm(channels), OneByOneConvolution(channels), AffineCouplingTransform(
                create_mid_split_binary_mask(channels), lambda *sizes: ContextFree(shape.net(*sizes)))]
        transform.add_transform(CompositeTransform(steps), (channels, resolution, resolution))
    model = Flow(transform, StandardNormal([3 * shape.resolution**2]))
    return Subject(model, lambda model, x: -model.log_prob(x).mean(), lambda model, count: model.sample(count))


class ContextFree(nn.Module):
    """A network with the context that nflows hands to every one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def build_glow_pytorch(shape: Shape) -> Subject:
    code = sys.modules[GLOW_PYTORCH]
    model = code.Glow(3, shape.depth, shape.levels)
    for block, (channels, _) in zip(model.blocks, shape.stages()):
        for step in block.flows:
            step.coupling = code.AffineCoupling(channels, shape.width or 1)  # which Flow does not let one choose

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        log_p, log_det, _ = model(x)
        return -(log_p + log_det).mean()

    def sample(model: nn.Module, count: int) -> Tensor:
        stages = list(shape.stages())
        channels = [c // 2 for c, _ in stages[:-1]] + [stages[-1][0]]
        return model.reverse([noise(model, count, c, side, side) for c, (_, side) in zip(channels, stages)])

    return Subject(model, loss, sample)


BUILDERS: dict[str, Callable[[Shape], Subject]] = {
    "normflows": build_normflows, "freia": build_freia, "nflows": build_nflows, "glow_pytorch": build_glow_pytorch,
}  # fmt: skip


def build_glow(shape: Shape) -> Subject:
    """hflow_fast.models.Glow of this size, with normflows' options where it has them: no edge bias, 1 × 1 by LU."""
    model = Glow.from_config({"RESOLUTION": shape.resolution, "LEVELS": shape.levels, "STEPS": shape.depth,
                              "WIDTH": shape.width, "COUPLING": "affine", "PERMUTATION": "1x1_lu",
                              "EDGE_BIAS": False})  # fmt: skip
    model.set_precision(None)  # as the trainer does
    return Subject(model, lambda model, x: model.loss(x).mean(), lambda model, count: model.sample(count, std=1.0))


class Chain(nn.Module):
    """The same Glow of hflow_fast.nn's layers: images → negative log-likelihood (B,), in nats.

    Args:
        shape: Which Glow.
        reversible: Whether each level is wrapped in nn.Reversible.
    """

    def __init__(self, shape: Shape, reversible: bool) -> None:
        super().__init__()
        spec = CouplingSpec(scale_map="sigmoid", form="add_scale", active="channels")
        self.squeeze = Squeeze()
        self.levels = nn.ModuleList()
        for channels, _ in shape.stages():
            steps = [layer for _ in range(shape.depth) for layer in (
                ActNorm(channels), InvConv1x1(channels),
                AffineCoupling(shape.net(channels // 2, channels), spec))]  # fmt: skip
            self.levels.append(Reversible(Sequential(*steps)) if reversible else Sequential(*steps))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), device=x.device)
        for number, level in enumerate(self.levels, start=1):
            x, log_det = level(self.squeeze(x)[0])
            total = total + log_det
            if number < len(self.levels):
                x, latent = x.chunk(2, dim=1)
                total = total + log_normal(latent)
        return -(total + log_normal(x))


def noise(model: nn.Module, *shape: int) -> Tensor:
    like = next(model.parameters())
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def take_networks_out(models: Sequence[nn.Module], run: Callable[[nn.Module], object]) -> None:
    """Replaces every coupling network of ``models``, which are alike, by equal :class:`FixedRaw`.

    Args:
        run: evaluates a model once, to see what its networks return.
    """
    places: list[tuple[str, str]] = []
    for name, module in models[0].named_modules():
        if not any(f"{name}.".startswith(f"{parent}.{child}.") for parent, child in places):
            places += [(name, child) for child, _ in module.named_children() if child in NETWORKS]
    networks = {place: getattr(models[0].get_submodule(place[0]), place[1]) for place in places}
    shapes: dict[tuple[str, str], torch.Size] = {}
    hooks = [network.register_forward_hook(lambda _net, _inputs, output, place=place: shapes.update({place: output.shape}))
             for place, network in networks.items()]  # fmt: skip
    run(models[0])
    for hook in hooks:
        hook.remove()
    for place, shape in shapes.items():
        fixed = FixedRaw(shape).to(next(networks[place].parameters()))
        for model in models:
            setattr(model.get_submodule(place[0]), place[1], copy.deepcopy(fixed))


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of each sample."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def import_glow_pytorch(folder: Path) -> ModuleType:
    """model.py of a checkout of rosinality/glow-pytorch, which is imported as it is."""
    spec = importlib.util.spec_from_file_location(GLOW_PYTORCH, folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[GLOW_PYTORCH] = module
    spec.loader.exec_module(module)
    return module


def is_installed(library: str) -> bool:
    name = PACKAGES.get(library, GLOW_PYTORCH)
    return name in sys.modules or importlib.util.find_spec(name) is not None


def version_of(library: str) -> str:
    """The installed version; of code without versions, the beginning of its SHA-256."""
    if library == "glow_pytorch":
        return hashlib.sha256(Path(sys.modules[GLOW_PYTORCH].__file__).read_bytes()).hexdigest()[:12]
    try:
        return metadata.version(PACKAGES[library])
    except metadata.PackageNotFoundError:
        return "unknown"
