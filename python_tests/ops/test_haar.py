from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_fast import reference
from hflow_fast.ops import haar

from ._cases import (
    DTYPES,
    MEMORY,
    assert_accurate,
    atol_of,
    log_det_of_jacobian,
    run,
    same_bits_for_any_thread_count,
    tensor,
)

OPTIONS = st.fixed_dictionaries(
    {
        "order": st.sampled_from(["colour", "wavelet"]),
        "rebalance": st.sampled_from([1.0, 1.7]),
        "mean": st.booleans(),
        "inverse": st.booleans(),
    }
)


@st.composite
def cases(draw):
    dimensions, options = draw(st.integers(1, 3)), draw(OPTIONS)
    levels = draw(st.integers(1, {1: 4, 2: 3, 3: 2}[dimensions]))
    sizes = [draw(st.integers(1, 12 // dimensions)) for _ in range(dimensions)]
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    if options["inverse"]:
        return options | {"levels": levels}, (batch, channels * 2 ** (levels * dimensions), *sizes)
    return options | {"levels": levels}, (batch, channels, *(size * 2**levels for size in sizes))


def inputs(shape, dtype=torch.float64, memory="contiguous"):
    return tensor(shape, dtype, memory, torch.Generator().manual_seed(0))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from(MEMORY))
def test_matches_the_reference(case, dtype, memory):
    options, shape = case
    x = inputs(shape, dtype, memory)
    assert_accurate(lambda t: haar(t, **options), lambda t: reference.haar(t, **options), [x], atol_of(x))


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_bands_and_channel_orders(function):
    p, q, r, s = 4.0, 2.0, 1.0, 7.0
    bands = torch.tensor([p + q + r + s, p - q + r - s, p + q - r - s, p - q - r + s]) / 2
    block = torch.tensor([[p, q], [r, s]])
    x = torch.stack([block, 10 * block])[None]
    torch.testing.assert_close(function(x)[0].flatten(), torch.cat([bands, 10 * bands]))
    wavelet = torch.stack([bands, 10 * bands], 1).flatten()
    torch.testing.assert_close(function(x, order="wavelet")[0].flatten(), wavelet)


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_band_zero_is_the_mean_image(function):
    x = inputs((2, 3, 8, 8))
    y, log_det = function(x, order="wavelet", mean=True)
    torch.testing.assert_close(y[:, :3], torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(log_det, torch.full((2,), -3 * 16 * math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("order", ["colour", "wavelet"])
@pytest.mark.parametrize("size", [(16,), (8, 16), (4, 8, 4)])
def test_levels_are_the_transform_applied_again(size, order):
    x = inputs((2, 3, *size))
    options = {"order": order, "rebalance": 1.3, "mean": True}
    twice, first = haar(x, **options)
    twice, second = haar(twice, **options)
    y, log_det = haar(x, levels=2, **options)
    torch.testing.assert_close(y, twice)
    torch.testing.assert_close(log_det, first + second)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("options", [{}, {"levels": 2, "order": "wavelet", "rebalance": 1.5, "mean": True}])
def test_round_trip(options, memory):
    x = inputs((2, 3, 8, 12), memory=memory)
    y, log_det = haar(x, **options)
    again, inverse_log_det = haar(y, **options, inverse=True)
    torch.testing.assert_close(again, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize("size", [(4,), (2, 4), (2, 2, 4)])
@pytest.mark.parametrize("options", [{}, {"rebalance": 1.5}, {"mean": True}, {"rebalance": 0.8, "mean": True}])
def test_log_det_is_that_of_the_jacobian(options, size):
    x = inputs((2, 2, *size))
    y, log_det = haar(x, **options)
    torch.testing.assert_close(log_det, log_det_of_jacobian(lambda t: haar(t, **options)[0], x))
    _, inverse_log_det = haar(y, **options, inverse=True)
    jacobian = log_det_of_jacobian(lambda t: haar(t, **options, inverse=True)[0], y)
    torch.testing.assert_close(inverse_log_det, jacobian)


def test_orthonormal():
    x = inputs((2, 3, 8, 8))
    torch.testing.assert_close(haar(x, levels=3)[0].square().sum(), x.square().sum())


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck_and_gradgradcheck(inverse):
    x = inputs((1, 8, 2, 4)).requires_grad_()
    function = lambda t: haar(t, inverse=inverse, rebalance=1.5, mean=True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_opcheck(memory, inverse):
    x = inputs((2, 4, 4, 6), torch.float32, memory).requires_grad_()
    torch.library.opcheck(torch.ops.hflow_fast.haar_fwd.default, (x, 1, True, 1.0, 1.0, inverse))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 1, 2), (1, 1, 2, 2, 2), (0, 1, 0)])
def test_empty_and_single(shape):
    results = run(haar, [inputs(shape, torch.float32)])
    for ours, theirs in zip(results, run(reference.haar, [inputs(shape, torch.float32)]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
def test_keeps_the_memory_format(memory, inverse):
    y, _ = haar(inputs((2, 8, 4, 6), torch.float32, memory), inverse=inverse)
    assert y.is_contiguous(memory_format=torch.channels_last if memory == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_for_any_thread_count(memory):
    x = inputs((3, 4, 128, 160), torch.float32, memory)
    assert same_bits_for_any_thread_count(haar, [x])
    assert same_bits_for_any_thread_count(lambda t: haar(t, inverse=True), [x])


def test_not_a_number_stays_in_its_block():
    x = torch.zeros(1, 1, 2, 6)
    x[0, 0, 1, 2] = float("nan")
    assert haar(x)[0].isnan()[0, :, 0].tolist() == [[False, True, False]] * 4


def test_flow_variables_stay_float32_under_autocast():
    x = inputs((2, 3, 4, 4), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = haar(x)
    assert (y.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, haar(x.float())[0])


def test_compiles_to_one_graph():
    x = inputs((2, 3, 4, 4), torch.float32)
    compiled = torch.compile(lambda t: haar(t), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, [x]), run(haar, [x]), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("function", [haar, reference.haar])
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {}, r"haar: x must have shape \(B, C, L\), .* got \(2, 3\)"),
        ((2, 3, 4, 6), {"levels": 2}, r"sizes of x must be multiples of 4 for 2 level\(s\), got \(2, 3, 4, 6\)"),
        ((2, 3, 5), {}, r"spatial sizes of x must be multiples of 2 for 1 level\(s\), got \(2, 3, 5\)"),
        ((2, 6, 4, 4), {"inverse": True}, r"of 4 channels for the inverse of 1 level\(s\), got \(2, 6, 4, 4\)"),
        ((2, 3, 4, 4), {"levels": 0}, "haar: levels must be from 1 to 15, got 0"),
        ((2, 3, 4, 4), {"levels": 40}, "haar: levels must be from 1 to 15, got 40"),
        ((2, 3, 4, 4), {"order": "color"}, "haar: order must be 'colour' or 'wavelet', got 'color'"),
        ((2, 3, 4, 4), {"rebalance": 0.0}, "haar: rebalance must be above 0 and finite, got 0.0"),
        ((2, 3, 4, 4), {"rebalance": float("nan")}, "haar: rebalance must be above 0 and finite, got nan"),
    ],
)
def test_bad_input_is_named(function, shape, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), **options)


@pytest.mark.parametrize("function", [haar, reference.haar])
def test_bad_dtype_is_named(function):
    with pytest.raises(ValueError, match="haar: x must be float32, .* got"):
        function(torch.zeros(2, 3, 4, 4).int())
