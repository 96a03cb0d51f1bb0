from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import CouplingSpec, coupling, flow_step

from ._cases import assert_accurate, log_det_of_jacobian, tensor

HFLOW = CouplingSpec("exp_clip", shift_clamp=5.0, active="checkerboard", block=2)


def inputs(shape, raw_channels, memory="contiguous"):
    generator, channels = torch.Generator().manual_seed(0), shape[1]
    shapes = shape, (shape[0], raw_channels, *shape[2:]), (channels, channels), (channels,)
    return [tensor(s, torch.float64, memory, generator) * (1.5 if s == shapes[1] else 1) for s in shapes]


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 32, 9, 9), (2, 33, 5, 5), (3, 64, 1, 1), (200, 2), (70, 16), (1, 3, 65, 67), (2, 12, 3000), (5, 8, 2, 2)],
)
def test_tile_edges_match_the_reference(shape, memory):
    spec = CouplingSpec("sigmoid", active="channels", layout="interleaved")
    tensors = inputs(shape, spec.raw_channels(shape[1]), memory=memory)
    assert_accurate(lambda *t: flow_step(*t, spec), lambda *t: reference.flow_step(*t, spec), tensors, 1e-14)


@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_the_couplings(inverse):
    x, raw, weight, bias = inputs((2, 3, 2, 4), 6)
    y, log_det = flow_step(x, raw, weight, bias, HFLOW, inverse=inverse)
    jacobians = torch.cat(
        [
            log_det_of_jacobian(
                lambda t, i=i: flow_step(t, raw[i : i + 1], weight, bias, HFLOW, inverse=inverse)[0], x[i : i + 1]
            )
            for i in range(2)
        ]
    )
    torch.testing.assert_close(log_det + 8 * torch.linalg.slogdet(weight).logabsdet, jacobians)
    u = torch.einsum("oc,bchw->bohw", torch.linalg.inv(weight), y - bias[:, None, None])
    again, opposite = coupling(u, raw, HFLOW, inverse=not inverse)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opposite, -log_det)


@pytest.mark.parametrize("function", [flow_step, reference.flow_step])
@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(3), r"flow_step: x must have shape \(B, C, ...\), got \(3,\)"),
        (1, torch.zeros(2, 5, 4, 4), r"flow_step: raw must have 6 channels, got \(2, 5, 4, 4\)"),
        (2, torch.zeros(3, 4), r"flow_step: weight must have shape \(3, 3\), got \(3, 4\)"),
        (3, torch.zeros(4), r"flow_step: bias must have shape \(3,\), got \(4,\)"),
        (2, torch.zeros(3, 3, dtype=torch.int32), "flow_step: weight must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, changed, value, message):
    tensors = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4), torch.zeros(3, 3), torch.zeros(3)]
    tensors[changed] = value
    with pytest.raises(ValueError, match=message):
        function(*tensors, CouplingSpec())
