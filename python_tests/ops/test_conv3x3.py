from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hflow_fast.ops._conv3x3 import conv3x3

from ._cases import run, same_bits_for_any_thread_count
from ._table import kernel_calls

# (B, C, H, W), outputs, groups: whole tiles and others, vectors of channels and others, more channels than a sum, a
# panel or a product's rows hold at once, more tiles than a chunk.
CASES = [
    ((2, 32, 16, 16), 32, 1),
    ((2, 153, 18, 13), 25, 1),
    ((1, 24, 33, 35), 70, 1),
    ((3, 64, 17, 30), 130, 1),
    ((33, 48, 3, 1), 40, 1),
    ((2, 96, 16, 20), 64, 2),
    ((5, 81, 11, 10), 75, 3),
]
ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps


def inputs(shape, outputs, groups, memory=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=memory)
    weight = torch.randn(outputs, shape[1] // groups, 3, 3, generator=generator).contiguous(memory_format=memory)
    return [x, weight / (3 * (shape[1] // groups) ** 0.5), torch.randn(outputs, generator=generator)]


def ours(groups):
    return lambda *tensors: (conv3x3(*tensors, groups=groups),)


def torchs(groups):
    return lambda *tensors: (F.conv2d(*tensors, padding=1, groups=groups),)


def assert_close_to_float64(tensors, groups):
    """The error's norm is at most twice the library's plus 16 units in the last place, its largest entry 64 such units
    of the largest value: where other kernels are allowed 4, as Winograd's transforms weigh some rounded values by 8."""
    exact = run(torchs(groups), [t.double() for t in tensors])
    for found, library, expected in zip(run(ours(groups), tensors), run(torchs(groups), tensors), exact, strict=True):
        assert (found.shape, found.dtype) == (library.shape, library.dtype)
        error = found.double() - expected
        assert error.norm() <= 2 * (library - expected).norm() + 16 * EPS * expected.norm()
        assert error.abs().max() <= 64 * EPS * expected.abs().max()


def by_kernel(*tensors, groups=1):
    names = [op.overloadpacket.__name__ for op, _ in kernel_calls(ours(groups), tensors)]
    assert names in ([], ["conv3x3_fwd", "conv3x3_bwd"])
    return bool(names)


@pytest.mark.parametrize(("shape", "outputs", "groups"), CASES)
def test_outputs_and_gradients(shape, outputs, groups):
    tensors = inputs(shape, outputs, groups)
    assert by_kernel(*tensors, groups=groups)
    assert_close_to_float64(tensors, groups)


def test_sums_over_many_channels_and_tiles_stay_accurate():
    """In one go, sums of 512 terms would be three times as far off."""
    tensors = inputs((16, 512, 32, 32), 64, 1)
    exact = run(torchs(1), [t.double() for t in tensors])
    for ulps, found, expected in zip((16, 20, 16, 2), run(ours(1), tensors), exact, strict=True):
        assert (found - expected).norm() <= ulps * EPS * expected.norm()


@pytest.mark.parametrize(("shape", "outputs", "groups"), CASES)
def test_same_bits_for_any_thread_count(shape, outputs, groups):
    assert same_bits_for_any_thread_count(ours(groups), inputs(shape, outputs, groups))


def test_same_bits_for_a_sample_alone():
    x, weight, bias = inputs((6, 40, 24, 24), 40, 1)
    together = conv3x3(x, weight, bias)
    assert by_kernel(x[2:3], weight, bias)
    assert torch.equal(conv3x3(x[2:3], weight, bias), together[2:3])


def test_weights_in_the_other_memory_format():
    x, weight, bias = inputs((2, 32, 16, 16), 48, 1)
    expected = run(ours(1), [x, weight, bias])
    for found, same in zip(run(ours(1), [x, weight.contiguous(), bias]), expected, strict=True):
        assert torch.equal(found, same)


def test_kernels_are_what_torch_expects_of_operations():
    tensors = [t.requires_grad_() for t in inputs((2, 32, 16, 16), 40, 1)]
    torch.library.opcheck(torch.ops.hflow_fast.conv3x3_fwd.default, (*tensors, 1))


def test_compiles_without_a_graph_break():
    tensors = inputs((2, 32, 16, 16), 40, 1)
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), conv3x3(*tensors))


def test_no_images():
    tensors = [t.requires_grad_() for t in inputs((0, 32, 16, 16), 40, 1)]
    y = torch.ops.hflow_fast.conv3x3_fwd(*tensors, 1)
    assert y.shape == (0, 40, 16, 16)
    assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_spreads_to_its_neighbours_and_no_further_than_their_tiles(bad):
    x, weight, bias = inputs((2, 32, 16, 16), 32, 1)
    x[1, 3, 8, 6] = bad  # a border of tiles runs above row 8
    spoiled = ~conv3x3(x, weight, bias).isfinite().all(1)
    assert spoiled[1, 7:10, 5:8].all()
    assert not spoiled[0].any()
    spoiled[1, 4:12, 4:8] = False
    assert not spoiled.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.contiguous(), w, b),
        lambda x, w, b: (x.double(), w.double(), b.double()),
        lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()),
        lambda x, w, b: (x[:, :16].contiguous(memory_format=torch.channels_last), w[:, :16], b),
        lambda x, w, b: (x, w[:16], b[:16]),
        lambda x, w, b: (x[:1], w, b),
    ],
    ids=["contiguous", "float64", "bfloat16", "few channels", "few outputs", "few pixels"],
)
def test_the_library_where_the_kernel_would_not_pay(change):
    tensors = inputs((2, 32, 16, 16), 32, 1)
    assert by_kernel(*tensors)
    changed = change(*tensors)
    assert not by_kernel(*changed)
    assert torch.equal(conv3x3(*changed), F.conv2d(*changed, padding=1))


def test_autocast_stays_the_librarys():
    tensors = inputs((2, 32, 16, 16), 32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(*tensors).dtype == torch.bfloat16


def test_transforms_and_forward_mode_stay_the_librarys():
    x, weight, bias = inputs((2, 32, 16, 16), 32, 1)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: conv3x3(x[None], w, bias).square().sum()), (None, 0))
    assert per_sample(weight, x).shape == (2, *weight.shape)
    _, tangent = torch.func.jvp(lambda x: conv3x3(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, F.conv2d(x, weight, padding=1))


def test_second_derivatives_say_how_to_get_them():
    x, weight, bias = (t.requires_grad_() for t in inputs((2, 32, 16, 16), 32, 1))
    (gradient,) = torch.autograd.grad(conv3x3(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="conv3x3 has no second derivative; set HFLOW_FAST_WINOGRAD=0"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.double(), w, b, 1), "conv3x3: x must be float32, got Double"),
        (lambda x, w, b: (x, w.bfloat16(), b, 1), "conv3x3: weight must be float32, got BFloat16"),
        (lambda x, w, b: (x[0], w, b, 1), r"conv3x3: x must have shape \(B, C, H, W\), got \(32, 16, 16\)"),
        (lambda x, w, b: (x, w[0], b, 1), r"conv3x3: weight must have shape \(K, C / groups, 3, 3\), got"),
        (lambda x, w, b: (x, w[..., :1], b, 1), r"conv3x3: weight must have shape \(40, 32, 3, 3\), got"),
        (lambda x, w, b: (x, w, b, 2), r"conv3x3: weight must have shape \(40, 16, 3, 3\), got"),
        (lambda x, w, b: (x, w, b, 3), "conv3x3: groups must divide the channels of x, 32, and of the result, 40"),
        (lambda x, w, b: (x, w, b, 0), "conv3x3: groups must divide .* got 0"),
        (lambda x, w, b: (x, w, b[1:], 1), r"conv3x3: bias must have shape \(40,\), got \(39,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.hflow_fast.conv3x3_fwd(*change(*inputs((2, 32, 16, 16), 40, 1)))


def test_bad_gradient_is_named():
    tensors = inputs((2, 32, 16, 16), 40, 1)
    with pytest.raises(ValueError, match=r"conv3x3: grad_y must have the shape of x, .* with 40 channels, got"):
        torch.ops.hflow_fast.conv3x3_bwd(*tensors, torch.zeros(2, 40, 16, 15), 1)


IN_ANOTHER_PROCESS = """
import torch
from hflow_fast._extension import build_info
from python_tests.ops import test_conv3x3 as tests
print(build_info()["vector_selected"], tests.by_kernel(*tests.inputs((2, 32, 16, 16), 32, 1)))
for case in tests.CASES if {check} else []:
    tests.test_outputs_and_gradients(*case)
"""


def in_another_process(check: bool, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS.format(check=check)], cwd=ROOT,
                            env={**os.environ, **environment}, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_vector_width(isa):
    assert in_another_process(True, HFLOW_FAST_ISA=isa) in (f"{isa} True", "baseline True")


def test_can_be_turned_off():
    assert in_another_process(False, HFLOW_FAST_WINOGRAD="0").endswith("False")


def test_benchmark(tmp_path):
    results, page = tmp_path / "folder" / "conv3x3.csv", tmp_path / "page.md"
    page.write_text("<!-- convolutions -->\n<!-- /convolutions -->\n")
    command = [sys.executable, ROOT / "benchmarks" / "bench_conv3x3.py", "--containing", "128→128, 8", "--repeats", "2"]
    for options in (["--dry-run"], ["--results", results, "--markdown", page]):
        output = subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
        assert [line.split()[2] for line in output.splitlines() if "8×8" in line] == ["forward", "backward"]
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["work"] for row in rows] == ["forward", "backward"]
    assert page.read_text().count("| 128→128, 8×8 |") == 2
    assert all(float(row["ours_ms_q20"]) <= float(row["ours_ms_q80"]) and float(row["ours_error"]) < 1e-5 for row in rows)
