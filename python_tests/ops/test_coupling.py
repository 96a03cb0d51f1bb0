from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from hflow_fast import reference
from hflow_fast.ops import CouplingSpec, active_mask, coupling

from ._cases import SCALE_MAPS, log_det_of_jacobian, run, tensor
from ._table import ROWS, Call, every_device


def inputs(shape, raw_channels, dtype=torch.float64, memory="contiguous"):
    generator = torch.Generator().manual_seed(0)
    x = tensor(shape, dtype, memory, generator)
    return x, 1.5 * tensor((shape[0], raw_channels, *shape[2:]), dtype, memory, generator)


@every_device
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("row", [row for row in ROWS if "raw" in row.tensors], ids=lambda row: row.name)
def test_every_combination_in_float64(row, scale_map, memory, device):
    choices = {
        "layout": ["halves", "interleaved"],
        "shift_first": [False, True],
        "form": ["scale_shift", "add_scale", "subtract_scale"],
        "active": ["all", "channels", "channels_ceil", "checkerboard", "columns", "rows"],
    }
    for values in itertools.product(*choices.values()):
        spec = CouplingSpec(scale_map, clamp=1.2, shift_clamp=1.0, block=2, parity=1, **dict(zip(choices, values)))
        for raw_channels, inverse in itertools.product(
            {spec.raw_channels(5), spec.raw_channels(spec.active_channels(5))}, (0, 1)
        ):
            shapes = {"x": (1, 5, 4, 7), "raw": (1, raw_channels, 4, 7), "weight": (5, 5), "bias": (5,)}
            call = Call(tuple(shapes[name] for name in row.tensors), {"spec": spec, "inverse": bool(inverse)})
            tensors = row.inputs(call, memory=memory, device=device)
            for a, b in zip(run(row.function(call), tensors), run(row.reference(call), tensors), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text: f"{spec}: {text}")


@pytest.mark.parametrize("form", ["scale_shift", "add_scale", "subtract_scale"])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_gradcheck(scale_map, form):
    spec = CouplingSpec(scale_map, shift_clamp=2.0, form=form, active="channels", layout="interleaved")
    tensors = [t.requires_grad_() for t in inputs((2, 3, 2, 2), spec.raw_channels(3))]
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda *t: coupling(*t, spec, inverse=inverse), tensors)


@pytest.mark.parametrize("active", ["all", "channels", "channels_ceil", "checkerboard", "columns", "rows"])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_round_trip_and_log_det(scale_map, active):
    for form in ("scale_shift", "add_scale", "subtract_scale"):
        spec = CouplingSpec(scale_map, form=form, active=active)
        x, raw = inputs((2, 3, 2, 4), spec.raw_channels(3))
        y, log_det = coupling(x, raw, spec)
        again, inverse_log_det = coupling(y, raw, spec, inverse=True)
        torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inverse_log_det, -log_det)
        jacobians = [
            log_det_of_jacobian(lambda t, i=i: coupling(t, raw[i : i + 1], spec)[0], x[i : i + 1]) for i in range(2)
        ]
        torch.testing.assert_close(log_det, torch.cat(jacobians), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_float32_round_trip(scale_map):
    spec = CouplingSpec(scale_map)
    x, raw = inputs((2, 3, 16, 16), spec.raw_channels(3), torch.float32)
    y, _ = coupling(x, raw, spec)
    again, _ = coupling(y, raw, spec, inverse=True)
    # x·a·a⁻¹ rounds three times; x·a + t loses what t absorbs
    limit = 4e-7 * (1 + x.abs() + raw.abs().amax() * torch.exp(raw.abs().amax()))
    assert ((again - x).abs() <= limit).all()


def test_the_formulas_of_the_libraries():
    x, raw = inputs((2, 4, 3, 3), 8)
    s, t = raw.chunk(2, 1)
    hflow, _ = coupling(x, raw, CouplingSpec("exp_clip", clamp=3.0, shift_clamp=5.0), inverse=True)
    torch.testing.assert_close(hflow, (x - t.clamp(-5, 5)) * torch.exp(-s.clamp(-3, 3)))
    glow, _ = coupling(x, raw, CouplingSpec("sigmoid", form="add_scale"))
    torch.testing.assert_close(glow, (x + t) * torch.sigmoid(s + 2))
    normflows, _ = coupling(x, raw, CouplingSpec("sigmoid_inverse", layout="interleaved", shift_first=True))
    torch.testing.assert_close(normflows, x / torch.sigmoid(raw[:, 1::2] + 2) + raw[:, 0::2])
    nflows, _ = coupling(x, raw, CouplingSpec("sigmoid_floor", shift_first=True))
    torch.testing.assert_close(nflows, x * (torch.sigmoid(t + 2) + 1e-3) + s)
    freia, _ = coupling(x, raw, CouplingSpec("atan", clamp=2.0))
    torch.testing.assert_close(freia, x * torch.exp(2.0 * 0.636 * torch.atan(s)) + t)
    wavelet_flow, _ = coupling(x, raw, CouplingSpec("exp_tanh"))
    torch.testing.assert_close(wavelet_flow, x * torch.exp(torch.tanh(s)) + t)


def test_active_sets_by_index():
    board = active_mask(CouplingSpec(active="checkerboard", block=2, parity=1), (1, 3, 4, 6))
    expected = [[(i // 2 + j // 2) % 2 == 1 for j in range(6)] for i in range(4)]
    assert board.tolist() == expected
    assert (
        active_mask(CouplingSpec(active="columns", parity=0), (1, 3, 2, 5)).tolist()
        == [[True, True, False, False, False]] * 2
    )
    assert active_mask(CouplingSpec(active="rows", parity=1), (1, 3, 4, 2))[:, 0].tolist() == [False, False, True, True]
    assert active_mask(CouplingSpec(active="channels"), (1, 5, 2, 2)).flatten().tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert (
        active_mask(CouplingSpec(active="channels_ceil"), (1, 5, 2, 2)).flatten().tolist() == [False] * 3 + [True] * 2
    )


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("block", "size"), [(2, (3, 5)), (4, (6, 7)), (8, (12, 9)), (8, (5, 3)), (1, (1, 1))])
def test_checkerboards_need_not_tile_the_image(block, size, memory):
    for parity in (0, 1):
        spec = CouplingSpec(active="checkerboard", block=block, parity=parity)
        x, raw = inputs((2, 3, *size), 6, memory=memory)
        y, log_det = coupling(x, raw, spec)
        rows, columns = map(range, size)
        active = torch.tensor([[(i // block + j // block) % 2 == parity for j in columns] for i in rows])
        s, t = raw.chunk(2, 1)
        torch.testing.assert_close(y, torch.where(active, x * s.exp() + t, x))
        torch.testing.assert_close(log_det, torch.where(active, s, 0).sum((1, 2, 3)))
        torch.testing.assert_close(coupling(y, raw, spec, inverse=True)[0], x)


@pytest.mark.parametrize("function", [coupling, reference.coupling])
@pytest.mark.parametrize("active", ["channels", "checkerboard", "columns", "rows"])
def test_passive_raw_values_are_ignored(function, active):
    spec = CouplingSpec("exp", active=active)
    x, raw = inputs((2, 4, 6, 6), 8, torch.float32)
    passive = ~active_mask(spec, x.shape).expand(x.shape)
    poisoned = torch.where(passive.repeat(1, 2, 1, 1), float("nan"), raw)
    results = run(lambda *t: function(*t, spec), (x, raw))
    for clean, poisoned_result in zip(results, run(lambda *t: function(*t, spec), (x, poisoned)), strict=True):
        torch.testing.assert_close(clean, poisoned_result, rtol=0, atol=0)
    assert torch.equal(results[0][passive], x[passive])
    assert not results[3][passive.repeat(1, 2, 1, 1)].any()


def test_hard_clips_have_no_gradient_outside_and_keep_nan():
    spec = CouplingSpec("exp_clip", clamp=3.0, shift_clamp=5.0)
    x = torch.ones(1, 4)
    raw = torch.tensor([[4.0, 3.0, -3.5, float("nan"), 6.0, 5.0, 0.0, 0.0]], requires_grad=True)
    y, log_det = coupling(x, raw, spec)
    torch.testing.assert_close(y[0, :3], torch.tensor([3.0, 3.0, -3.0]).exp() + torch.tensor([5.0, 5.0, 0.0]))
    assert y[0, 3].isnan() and log_det.isnan()
    (gradient,) = torch.autograd.grad(y[0, :3].sum(), raw)
    assert gradient[0, [0, 2, 4]].tolist() == [0, 0, 0]
    torch.testing.assert_close(gradient[0, [1, 5, 6]], torch.tensor([torch.e**3, 1.0, 1.0]))


@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_extreme_values_match_the_reference(scale_map):
    extremes = torch.tensor([0.0, 1e-30, -1e-30, 60.0, -60.0, 200.0, -200.0, float("inf"), -float("inf"), float("nan")])
    spec = CouplingSpec(scale_map)
    x = torch.full((100, 1), 1.5)
    t, s = (grid.reshape(100, 1) for grid in torch.meshgrid(extremes, extremes, indexing="ij"))
    raw = t if scale_map == "none" else torch.cat([s, t], 1)
    for inverse in (False, True):
        ours, theirs = coupling(x, raw, spec, inverse=inverse), reference.coupling(x, raw, spec, inverse=inverse)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("function", [coupling, reference.coupling])
@pytest.mark.parametrize(
    ("shape", "raw_shape", "spec", "message"),
    [
        ((2, 3, 4, 4), (2, 3, 4, 4), CouplingSpec(), r"coupling: raw must have 6 channels, got \(2, 3, 4, 4\)"),
        (
            (2, 3, 4, 4),
            (2, 5, 4, 4),
            CouplingSpec(active="channels"),
            r"raw must have 6 or 4 channels, got \(2, 5, 4, 4\)",
        ),
        ((2, 3, 4, 4), (2, 6, 4, 4), CouplingSpec("none"), r"raw must have 3 channels, got \(2, 6, 4, 4\)"),
        (
            (2, 3, 4, 4),
            (2, 6, 4, 5),
            CouplingSpec(),
            r"raw must have the shape of x, \(2, 3, 4, 4\), with 6 channels, got",
        ),
        ((2, 3), (2, 6), CouplingSpec(active="rows"), r"spatial active set needs x of shape .*, got \(2, 3\)"),
        ((3,), (6,), CouplingSpec(), r"x must have shape \(B, C, ...\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(function, shape, raw_shape, spec, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), torch.zeros(raw_shape), spec)


@pytest.mark.parametrize("function", [coupling, reference.coupling])
def test_integer_raw_is_refused(function):
    with pytest.raises(ValueError, match="coupling: raw must be float32, .* got"):
        function(torch.zeros(2, 3), torch.zeros(2, 6, dtype=torch.int32), CouplingSpec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_map": "softplus"}, "scale_map must be one of 'none', 'exp', .* got 'softplus'"),
        ({"clamp": 0.0}, "clamp must be positive, got 0.0"),
        ({"clamp": None}, "clamp must be positive, got None"),
        ({"shift_clamp": -1.0}, "shift_clamp must be positive or None, got -1.0"),
        ({"layout": "thirds"}, "layout must be one of 'halves', 'interleaved', got 'thirds'"),
        ({"active": "odd"}, "active must be one of .* got 'odd'"),
        ({"form": "x"}, "form must be one of .* got 'x'"),
        ({"block": 3}, "block must be one of 1, 2, 4, 8, got 3"),
        ({"parity": 2}, "parity must be one of 0, 1, got 2"),
    ],
)
def test_bad_spec_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CouplingSpec(**options)


def test_specs_are_values():
    assert CouplingSpec() == CouplingSpec() and hash(CouplingSpec()) == hash(CouplingSpec())
    assert dataclasses.replace(CouplingSpec(), parity=1).arguments != CouplingSpec().arguments
