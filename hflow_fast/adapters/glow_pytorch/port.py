"""Fast classes for code that people copy: made for the class at hand, once, of a mix-in and that class."""

from __future__ import annotations

import copyreg
import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn._fusion import Coupling, Evaluated
from ...ops import CouplingSpec, coupling
from .._chain import Map, Part, Shuffle, evaluate

__all__ = ["Port", "evaluate_as_stock", "fast_class", "first_convolution_inputs", "normal_log_prob"]


class Port(nn.Module):
    """Base of the mix-ins. What a class has to look like for one stands in its class attributes and :meth:`layout`."""

    origin: ClassVar[str]
    """The repository whose classes it speeds up."""
    methods: ClassVar[dict[str, tuple[str, ...]]]
    """Methods the class must have, with the names of their arguments; the first may be called anything."""
    attributes: ClassVar[tuple[str, ...]] = ()
    """What instances must have beside parameters, buffers and submodules."""

    overrides: ClassVar[tuple[str, ...]] = ()
    """Methods of the class, beside those above, that the mix-in has, too."""

    @classmethod
    @functools.cache
    def own_names(cls) -> frozenset[str]:
        """Names that must mean what they mean here."""
        return frozenset(dir(cls)) - frozenset(dir(nn.Module)) - {*cls.methods, *cls.overrides}

    @classmethod
    def layout(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters and buffers that ``module`` itself has to have."""
        return {}

    @classmethod
    def children_of(cls, module: nn.Module) -> dict[str, tuple[type[Port], ...]]:
        """The submodules it has to have, and the ports that they, or the members of a list, may fit; none: anything."""
        return {}

    @classmethod
    def enough(cls, children: list[nn.Module]) -> list[nn.Module]:
        """Which members of a list of submodules it takes to try it."""
        return children

    @classmethod
    def networks(cls, module: nn.Module) -> dict[str, tuple[int, int]]:
        """Which of them are networks that :class:`.trial.Trial` replaces; input and output channels."""
        return {}

    @classmethod
    def channels(cls, module: nn.Module) -> int:
        """C of the flow variable it takes."""
        raise NotImplementedError

    @classmethod
    def example(cls, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Values for the parameter ``name`` to try the layer with: as if trained, and well-conditioned."""
        options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        values = torch.rand(shape, **options) * 0.6 - 0.3
        if len(shape) < 2 or shape[0] != shape[1] or shape.numel() != shape[0] ** 2 or shape[0] == 1:
            return values
        rotation = torch.linalg.qr(torch.randn(shape[:2], **options))[0].view(shape)
        return 1.2 * rotation if name == "weight" else 0.3 * rotation

    @classmethod
    def prepare(cls, twin: nn.Module) -> None:
        """Makes a copy that is to be tried count as initialised."""

    @classmethod
    def run_trial(cls, module: nn.Module, x: Tensor) -> list[Any]:
        """Everything that is seen of a layer from outside, for an input ``x`` (B, C, H, W) or what it makes of it."""
        raise NotImplementedError

    @classmethod
    def readiness(cls, module: nn.Module) -> str | None:
        """Why a layer that fits has to stay for now."""
        return None

    @classmethod
    def called(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """The submodules that its fast class goes on calling, or asks for their parts."""
        return tuple(module.children())

    def parts(self, inverse: bool) -> list[Part]:
        """What one direction of this layer does, in order; ``inverse``: latent → data."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> Any:
        # Pickle finds classes by name, and this one has none.
        rebuild, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if rebuild is not copyreg.__newobj__:
            return rebuild, arguments, *state
        mixin, stock = type(self).__bases__
        return _new, (mixin, stock, *arguments[1:]), *state


@functools.cache
def fast_class(port: type[Port], stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``stock`` that runs fused, named like it."""
    return type(stock.__name__, (port, stock), {"__module__": __package__, "__doc__": stock.__doc__})


def _new(port: type[Port], stock: type[nn.Module], *arguments: Any) -> nn.Module:
    fast = fast_class(port, stock)
    return fast.__new__(fast, *arguments)


def first_convolution_inputs(network: nn.Module) -> int:
    """How many channels a network takes, by its first convolution."""
    found = [module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise AttributeError("there is no convolution in its network")
    return found[0]


def evaluate_as_stock(parts: list[Part], x: Tensor) -> Evaluated:
    """:func:`.._chain.evaluate`, with a log-det 0-dim, as in the ports, where it is the same for every ``x``."""
    y, log_det = evaluate(parts, x)
    if all(isinstance(part, (Map, Shuffle)) or _is_additive(part) for part in parts):
        return y, log_det[0] if len(log_det) else log_det.sum()
    return y, log_det


def _is_additive(part: Part) -> bool:
    return isinstance(part, Coupling) and part.spec.scale_map == "none"


def normal_log_prob(z: Tensor, raw: Tensor, spec: CouplingSpec) -> Tensor:
    """log N(z; mean, e^log_std) of each sample, (B,); ``spec`` says how ``raw`` holds the two, as scale and shift."""
    noise, log_det = coupling(z, raw, spec, inverse=True)
    squares = noise.to(log_det.dtype).square().flatten(1).sum(dim=1)
    return log_det - 0.5 * (squares + math.log(2 * math.pi) * math.prod(z.shape[1:]))
