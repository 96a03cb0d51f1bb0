"""The rotation's exponential against torch's in float64: values, gradients, edges."""

from __future__ import annotations

import pytest
import torch

from hflow_fast.nn.skew_exponential import skew_exponential


def exact(generator: torch.Tensor) -> torch.Tensor:
    generator = generator.double()
    return torch.matrix_exp(generator - generator.mT)


def worst(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got.double() - expected).abs().max().item()


@pytest.mark.parametrize("size", [1, 2, 5, 33, 200])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 10.0])
def test_is_at_least_as_accurate_as_torch(size, spread):
    generator = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size)) * spread
    expected = exact(generator)
    torchs = worst(torch.matrix_exp(generator - generator.mT), expected)
    got = skew_exponential(generator)
    assert worst(got, expected) <= 2 * torchs + 1e-6
    assert worst(got @ got.mT, torch.eye(size).double().expand(3, -1, -1)) < 1e-5
    assert worst(skew_exponential(generator.double()), expected) < 1e-11


def test_gradients():
    generator = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(skew_exponential, generator)
    assert torch.autograd.gradgradcheck(skew_exponential, generator)


def test_gradient_of_a_large_matrix():
    generator = torch.randn(120, 120, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(120, 120, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function, dtype in ((exact, torch.float64), (skew_exponential, torch.float32)):
        leaf = generator.to(dtype).requires_grad_()
        (function(leaf) * weight).sum().backward()
        gradients.append(leaf.grad)
    assert worst(gradients[1], gradients[0]) < 1e-5 * gradients[0].abs().max().item()


def test_edges():
    assert torch.equal(skew_exponential(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, -1, -1))
    assert skew_exponential(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert skew_exponential(torch.full((1, 2, 2), torch.nan)).isnan().all()
    assert skew_exponential(torch.tensor([[0.0, torch.inf], [0.0, 0.0]])).isnan().all()
    with torch.autocast("cpu", torch.bfloat16):
        got = skew_exponential(torch.ones(2, 4, 4).triu())
    assert got.dtype == torch.float32 and worst(got, exact(torch.ones(2, 4, 4).triu())) < 1e-6
    assert skew_exponential(torch.ones(3, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_compiles_without_a_graph_break():
    generator = torch.randn(2, 4, 4)
    compiled = torch.compile(skew_exponential, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(generator), skew_exponential(generator))
