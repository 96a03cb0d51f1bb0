"""Whole models of the PyTorch ports of Glow, before and after: values, gradients, samples, copies, fusing."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from hflow_fast.adapters import accelerate, restore

from . import chaiyujin_stand_in
from .conftest import assert_same, perturbed
from .glow_ports import IMAGES, PORTS, Port, each_port, each_variant


def images(count: int = IMAGES[0]) -> Tensor:
    return torch.randn(count, *IMAGES[1:], generator=torch.Generator().manual_seed(1))


@each_variant
def test_values_and_gradients(port: Port, coupling: str, permutation: str) -> None:
    stock, fast, report = port.pair(coupling, permutation)
    assert report.replaced and not report.left
    for count in (4, 1):
        # Log-dets of one port are rounded to float32 in a model of float64, too.
        assert_same(stock, fast, images(count), call=port.encode, rtol=2e-5, exact=port.copies)
        assert_same(stock, fast, *port.latents(count), call=port.decode, rtol=1e-4, exact=False)


@each_variant
def test_float64(port: Port, coupling: str, permutation: str) -> None:
    stock, fast, _ = port.pair(coupling, permutation, torch.float64)
    assert_same(stock, fast, images().double(), call=port.encode, rtol=1e-7, exact=False)


@each_variant
@torch.no_grad()
def test_without_gradients_as_weights_change(port: Port, coupling: str, permutation: str) -> None:
    stock, fast, _ = port.pair(coupling, permutation)
    for _ in range(2):
        for _ in range(2):
            for model in (stock, fast):
                torch.manual_seed(3)
                model.results = [*tensors(port.encode(model, images())), port.decode(model, *port.latents())]
            for expected, got in zip(stock.results, fast.results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        for model in (stock, fast):
            for parameter in model.parameters():
                parameter.data.mul_(1.02)  # which leaves no trace


def tensors(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in tensors(part)]


@each_port
def test_report(port: Port) -> None:
    stock, fast, report = port.pair()
    kinds = {layer.kind.split(".")[1] for layer in report.replaced}
    assert kinds == ({"FlowNet", "FlowStep", "ActNorm2d", "InvertibleConv1x1", "SqueezeLayer", "Split2d", "Conv2d"}
                     if port.accumulates else
                     {"Block", "Flow", "ActNorm", "InvConv2dLU", "AffineCoupling", "Sequential"})
    again = accelerate(fast)
    assert not again.replaced and len(again.already) == len(report.replaced)
    port.encode(fast, images())
    restore(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in stock.modules()]
    assert "hflow_fast" not in "".join(type(value).__module__ for module in fast.modules()
                                       for value in vars(module).values())


@each_port
@torch.no_grad()
def test_state_copies_and_pickles(port: Port) -> None:
    _, fast, _ = port.pair()
    expected = tensors(port.encode(fast, images()))
    copied = copy.deepcopy(fast)
    assert [type(module) for module in copied.modules()] == [type(module) for module in fast.modules()]
    again = [copied]
    if port.copies:
        saved = io.BytesIO()
        torch.save(fast, saved)
        saved.seek(0)
        again += [pickle.loads(pickle.dumps(fast)), torch.load(saved, weights_only=False)]
    for model in again:
        assert all(torch.equal(a, b) for a, b in zip(tensors(port.encode(model, images())), expected, strict=True))
    other = perturbed(port.trained())
    other.load_state_dict(fast.state_dict())
    for got, value in zip(tensors(port.encode(other, images())), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(port.encode(fast, images())), expected, strict=True))


@each_port
def test_training_goes_on(port: Port) -> None:
    stock, fast = port.trained(), port.trained()
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=1e-5) for model in (stock, fast)}
    accelerate(fast)
    for _ in range(3):
        for model, optimizer in optimizers.items():
            optimizer.zero_grad()
            (-sum(term.mean() for term in tensors(port.encode(model, images()))[:2])).backward()
            optimizer.step()
    for (name, expected), got in zip(stock.state_dict().items(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)


@each_port
def test_the_first_batch_initialises(port: Port) -> None:
    stock, fast = port.build("affine", "lu").train(), port.build("affine", "lu").train()
    fast.load_state_dict(stock.state_dict())
    report = accelerate(fast)
    assert report.replaced
    assert {layer.kind.split(".")[1] for layer in report.left} == {"ActNorm2d" if port.accumulates else "ActNorm"}
    assert all("not initialised" in layer.reason for layer in report.left)
    for model in (stock, fast):
        port.encode(model, images(16))
    for (name, expected), got in zip(stock.state_dict().items(), fast.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)
    assert not accelerate(fast).left
    assert_same(stock, fast, images(), call=port.encode, rtol=1e-4, exact=False)


def test_a_copy_that_uses_the_layers_of_another_model_stays() -> None:
    """As y0ast's layers do, which hold functions: a deepcopy of them is none."""
    torch.manual_seed(0)
    step = chaiyujin_stand_in.FlowStep(4, 6, LU_decomposed=True)
    step.actnorm.inited = True
    step.flow_permutation = lambda z, logdet, reverse: step.invconv(z, logdet, reverse)
    step.permuted = lambda z, logdet, reverse: step.flow_permutation(z, logdet, reverse)
    copied = copy.deepcopy(step)
    assert "another layer" in accelerate(copied).left[0].reason
    x = torch.randn(2, 4, 2, 2)
    expected = step(x, 0.0)
    assert "" in [layer.name for layer in accelerate(step).replaced]
    for got, value in zip(step(x, 0.0), expected):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


@each_port
def test_one_pass_between_two_networks(port: Port, passes: list[str]) -> None:
    _, model, _ = port.pair()
    passes.clear()
    port.encode(model, images())
    assert passes == ["conv1x1", "flow_step", "coupling"] * 2
    passes.clear()
    port.decode(model, *port.latents())
    assert passes == ["flow_step", "flow_step"] * 2


@each_port
def test_hooks_added_later_are_called(port: Port) -> None:
    model = port.trained()
    expected = tensors(port.encode(model, images()))
    accelerate(model)
    seen: list[str] = []

    def note(module: nn.Module, *_: object) -> None:
        seen.append(type(module).__name__)

    flow = next(module for module in model.modules() if type(module).__name__ in ("Flow", "FlowStep"))
    flow.register_forward_hook(note)
    flow.actnorm.register_forward_hook(note)
    for got, value in zip(tensors(port.encode(model, images())), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-3)
    assert sorted(seen) == sorted([type(flow).__name__, type(flow.actnorm).__name__])


@each_port
def test_bf16_networks(port: Port) -> None:
    model = port.trained()
    expected = tensors(port.encode(model, images()))
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = tensors(port.encode(model, images()))
    for value, other in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert ((value - other).abs() < 0.1 * other.abs().max() + 0.1).all()


def test_compiled_after() -> None:
    stock, fast, _ = PORTS[0].pair()
    stock, fast = stock.blocks[1].flows[0], fast.blocks[1].flows[0]
    x = torch.randn(2, 24, 2, 2)
    fast(x)
    compiled = torch.compile(fast.forward, backend="aot_eager", fullgraph=True)
    for got, value in zip(compiled(x), stock(x), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-3)
