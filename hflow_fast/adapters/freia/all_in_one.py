"""FrEIA's AllInOneBlock: a coupling, then its global affine and permutation as one matrix, make one flow step."""

from __future__ import annotations

from functools import partial
from typing import Callable, Hashable, Sequence

import torch
from FrEIA import modules as stock
from torch import Tensor, nn

from ...nn._fusion import ChannelMap, Coupling, Opaque, Piece
from ...ops import CouplingSpec, actnorm, conv1x1
from ..networks import call_network
from .base import Conditioned, Evaluated, with_conditions
from .couplings import amplify, spec_of

__all__ = ["AllInOneBlock", "surroundings"]

Surroundings = tuple[list[Piece], list[Piece]]
"""What a block does before and behind its coupling."""

_NETWORK_GAIN = 0.1  # FrEIA's, of the network's output
_FOLDED_CHANNELS = 64  # beyond, a gradient for the matrix costs more than another pass over the flow variable


class AllInOneBlock(Conditioned, stock.AllInOneBlock):
    """Coupling of the last ⌊C/2⌋ channels, global affine, permutation; optionally the permutation's inverse before."""

    @staticmethod
    def unfit(layer: nn.Module) -> str:
        fits = layer.GIN or layer.clamp > 0
        return "" if fits else f"has affine_clamping {layer.clamp:g}; above 0 there is a kernel"

    def pieces(self, inverse: bool, context: Sequence[Tensor], like: Tensor) -> list[Piece]:
        return self.within(surroundings([self], inverse)[0], inverse, context)

    def within(self, around: Surroundings, inverse: bool, context: Sequence[Tensor]) -> list[Piece]:
        """All pieces of one direction, from those around the coupling."""
        before, behind = around
        return [*before, Coupling(partial(self._raw, context=context), self._spec(), inverse), *behind]

    def likeness(self) -> Hashable:
        """The same for blocks that :func:`surroundings` takes together."""
        scale, activation = self.global_scale, self.global_scale_activation
        # FrEIA's, a function without a name or a method, works on each element; nothing is known of another.
        own = getattr(activation, "__module__", None) == stock.AllInOneBlock.__module__
        return (self.in_channels, self.householder, self.GIN, self.reverse_pre_permute,
                activation.__code__ if own else id(self), scale.dtype, scale.device)

    def mixing(self, inverse: bool) -> Callable[[Tensor], Tensor]:
        """The permutation, which need not be one of FrEIA's hard ones, as a function."""
        return partial(conv1x1, weight=(self.w_perm_inv if inverse else self.w_perm).flatten(1))

    def _spec(self) -> CouplingSpec:
        if self.GIN:
            return spec_of(scale_map="exp", active="channels_ceil")
        return spec_of(scale_map="tanh", clamp=float(self.clamp), active="channels_ceil")

    def _raw(self, x: Tensor, context: Sequence[Tensor]) -> Tensor:
        raw = call_network(self.subnet, with_conditions(self, x[:, :self.splits[0]], context))
        if not self.GIN:
            return amplify(raw, _NETWORK_GAIN * self.clamp, _NETWORK_GAIN)
        scale, shift = (_NETWORK_GAIN * raw).chunk(2, dim=1)
        scale = self.clamp * torch.tanh(scale)
        return torch.cat([scale - scale.mean(dim=self.sum_dims, keepdim=True), shift], dim=1)


def surroundings(blocks: Sequence[AllInOneBlock], inverse: bool) -> list[Surroundings]:
    """What each of these blocks does around its coupling.

    The blocks follow one another and are of one :meth:`~AllInOneBlock.likeness`. The small tensors of all are computed
    together, in a dozen operations instead of a dozen for each.
    """
    for block in blocks:
        if block.householder and block.w_perm is not None:
            block.w_perm = block.w_perm_inv = None  # left by the stock block with its graph, which nothing can copy
    folds = blocks[0].in_channels <= _FOLDED_CHANNELS or blocks[0].householder
    return _folded(blocks, inverse) if folds else _in_two_passes(blocks, inverse)


def _folded(blocks: Sequence[AllInOneBlock], inverse: bool) -> list[Surroundings]:
    """Global affine and permutation in one matrix for each block."""
    scale, offset = _scales(blocks), _stacked([block.global_offset for block in blocks])
    matrix, zero = _matrices(blocks, inverse), offset.new_zeros(())
    if inverse:
        weight, bias = (matrix, -offset) if scale is None else (matrix / scale[..., None], -offset / scale)
    else:
        # A sum: products of matrices are rounded more under autocast, and with TF32.
        weight, bias = matrix if scale is None else matrix * scale[:, None], (matrix * offset[:, None]).sum(dim=-1)
    log_det = torch.zeros_like(offset[:, 0]) if scale is None else scale.log().sum(dim=-1)
    parts = zip(weight.unbind(), bias.unbind(), (-log_det if inverse else log_det).unbind())
    own = [[ChannelMap(*part)] for part in parts]
    undone: list[list[Piece]] = [[] for _ in blocks]
    if blocks[0].reverse_pre_permute:
        undone = [[ChannelMap(each, None, zero)] for each in _matrices(blocks, not inverse).unbind()]
    return list(zip(own, undone) if inverse else zip(undone, own))


def _in_two_passes(blocks: Sequence[AllInOneBlock], inverse: bool) -> list[Surroundings]:
    """With many channels the permutation's matrix, which is not trained, should need no gradient."""
    scale, offset = _scales(blocks), _stacked([block.global_offset for block in blocks])
    log_scale = torch.zeros_like(offset) if scale is None else scale.log()
    result: list[Surroundings] = []
    for block, *parameters in zip(blocks, log_scale.unbind(), offset.unbind()):
        affine = partial(actnorm, log_scale=parameters[0], bias=parameters[1], inverse=inverse)
        mix = block.mixing(inverse)
        own = [Opaque(partial(_mix_first if inverse else _mix_last, affine=affine, mix=mix))]
        undone = [Opaque(partial(_mix, mix=block.mixing(not inverse)))] if block.reverse_pre_permute else []
        result.append((own, undone) if inverse else (undone, own))
    return result


def _mix_last(x: Tensor, affine: Callable[[Tensor], Evaluated], mix: Callable[[Tensor], Tensor]) -> Evaluated:
    y, log_det = affine(x)
    return mix(y), log_det


def _mix_first(x: Tensor, affine: Callable[[Tensor], Evaluated], mix: Callable[[Tensor], Tensor]) -> Evaluated:
    return affine(mix(x))


def _mix(x: Tensor, mix: Callable[[Tensor], Tensor]) -> Evaluated:
    return mix(x), x.new_zeros(x.shape[0])


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """(1, C, …) each as (N, C)."""
    return torch.cat(list(parameters)).flatten(1)


def _scales(blocks: Sequence[AllInOneBlock]) -> Tensor | None:
    """(N, C); None: GIN, which has none."""
    if blocks[0].GIN:
        return None
    return blocks[0].global_scale_activation(torch.cat([block.global_scale for block in blocks])).flatten(1)


def _matrices(blocks: Sequence[AllInOneBlock], inverse: bool) -> Tensor:
    """(N, C, C)."""
    if not blocks[0].householder:
        return torch.stack([(block.w_perm_inv if inverse else block.w_perm).flatten(1) for block in blocks])
    start = torch.stack([block.w_0 for block in blocks])
    vectors = torch.stack([block.vk_householder for block in blocks])
    matrices = _reflected(start.double(), vectors.double()).to(start.dtype)
    return matrices.mT if inverse else matrices


def _reflected(start: Tensor, vectors: Tensor) -> Tensor:
    r"""W₀ (1 − 2 v₁v₁ᵀ/|v₁|²) … (1 − 2 vₖvₖᵀ/|vₖ|²) for W₀ (N, C, C) and v (N, k, C), at once.

    The product of reflections is 1 − Vᵀ U⁻¹ V with U = ½ diag(V Vᵀ) and the upper triangle of V Vᵀ: Joffrain et al.,
    "Accumulating Householder transformations, revisited", ACM TOMS 2006.
    """
    gram = vectors @ vectors.mT
    upper = gram.triu() - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) / 2
    return start - start @ vectors.mT @ torch.linalg.solve_triangular(upper, vectors, upper=True)
