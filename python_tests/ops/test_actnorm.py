from __future__ import annotations

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import actnorm


@pytest.mark.parametrize("function", [actnorm, reference.actnorm])
def test_is_an_affine_map_per_channel(function):
    x, log_scale, bias = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)
    s, b = log_scale[:, None, None], bias[:, None, None]
    y, log_det = function(x, log_scale, bias)
    torch.testing.assert_close(y, x * s.exp() + b)
    torch.testing.assert_close(log_det, (20 * log_scale.sum()).expand(2))
    torch.testing.assert_close(function(x, log_scale, bias, inverse=True)[0], (x - b) / s.exp())


@pytest.mark.parametrize("function", [actnorm, reference.actnorm, torch.ops.hflow_fast.actnorm_fwd])
@pytest.mark.parametrize(
    ("x", "log_scale", "bias", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2),
            torch.zeros(3),
            r"actnorm: log_scale must have shape \(3,\), got \(2,\)",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(3),
            torch.zeros(1, 3),
            r"actnorm: bias must have shape \(3,\), got \(1, 3\)",
        ),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), r"actnorm: x must have shape \(B, C, ...\), got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(3), "actnorm: x must be float32, .* got"),
        (torch.zeros(2, 3), torch.zeros(3).bool(), torch.zeros(3), "actnorm: log_scale must be float32, .* got"),
    ],
)
def test_bad_input_is_named(function, x, log_scale, bias, message):
    arguments = (False,) if function not in (actnorm, reference.actnorm) else ()
    with pytest.raises(ValueError, match=message):
        function(x, log_scale, bias, *arguments)
