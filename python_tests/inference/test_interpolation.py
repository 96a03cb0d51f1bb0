from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hflow_fast.data import from_uint8
from hflow_fast.inference import draw_latents, draw_samples, interpolate, latents_of, mix, there_and_back
from hflow_fast.models import HFlow


class Brightness(nn.Module):
    """A flow with nothing but what every model has."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.1))

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        return [x + self.shift], torch.zeros(len(x))

    def decode(self, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
        return latents[0] - self.shift, torch.zeros(len(latents[0]))


def test_lerp_and_slerp_against_their_formulas() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 2, 2), 2 * torch.randn(3, 4, 2, 2)
    for t in (0.25, 0.5, 0.9):
        (straight,), (curved,) = mix([a], [b], t, "lerp"), mix([a], [b], t, "slerp")
        torch.testing.assert_close(straight, (1 - t) * a + t * b)
        for x, y, z in zip(a.double(), b.double(), curved):
            angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
            expected = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
            torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-6)
    unit_a, unit_b = (x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b))
    half, = mix([unit_a], [unit_b], 0.5, "slerp")
    torch.testing.assert_close(half.flatten(1).norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="mode"):
        mix([a], [b], 0.5, "line")
    with pytest.raises(ValueError):
        mix([a], [b, b], 0.5)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_ends_are_exact_and_odd_angles_are_finite(mode: str) -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 5)
    for b in (torch.randn(1, 5), a, 1.000001 * a, -a, -2 * a, torch.zeros(1, 5)):
        assert torch.equal(mix([a], [b], 0.0, mode)[0], a) and torch.equal(mix([a], [b], 1.0, mode)[0], b)
        for t in (0.1, 0.5):
            between, = mix([a], [b], t, mode)
            assert between.isfinite().all() and between.abs().max() < 2 * a.abs().max()
    torch.testing.assert_close(mix([a], [a], 0.3, mode)[0], a)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
@pytest.mark.parametrize("space", ["z", "y"])
def test_frames_go_from_the_first_to_the_second(model: HFlow, images: torch.Tensor, mode: str, space: str) -> None:
    start, end = (latents_of(model, image[None]) for image in images[:2])
    frames = list(interpolate(model, start, end, 5, mode=mode, space=space))
    assert len(frames) == 5 and all(frame.shape == (1, 3, 16, 16) for frame in frames)
    assert torch.equal(frames[0][0], images[0]) and torch.equal(frames[-1][0], images[1])
    backwards = list(interpolate(model, end, start, 5, mode=mode, space=space, batch_size=2))
    for frame, same in zip(frames, reversed(backwards)):
        assert (frame.int() - same.int()).abs().max() <= 1
    assert not torch.equal(frames[2], frames[1])


@torch.no_grad()
def test_the_spaces_mix_what_they_say(model: HFlow) -> None:
    start, end = (draw_latents(model, range(2), std=1.0, seed=seed) for seed in (0, 1))
    middle = {space: list(interpolate(model, start, end, 3, space=space))[1] for space in ("z", "y")}
    latents = [(a + b) / 2 for a, b in zip(start, end)]
    expected = {"z": model.decode(latents)[0]}
    code = sum(model.endblock.decode(latents[-1])[0] for latents in (start, end)) / 2
    expected["y"] = model.decode([*latents[:-1], model.endblock.encode(code)[0]])[0]
    for space, picture in middle.items():
        assert picture.shape == (2, 3, 16, 16)
        assert (from_uint8(picture) - expected[space].clamp(-0.5, 0.5)).abs().max() < 1 / 256
    assert not torch.equal(middle["z"], middle["y"])


def test_samples_are_ends_too(model: HFlow) -> None:
    ends = [draw_latents(model, [0], std=0.7, seed=seed) for seed in (3, 4)]
    first, *_, last = interpolate(model, *ends, 4)
    for frame, seed in ((first, 3), (last, 4)):
        assert (frame.int() - draw_samples(model, 1, std=0.7, seed=seed).int()).abs().max() <= 1


def test_wrong_requests(model: HFlow) -> None:
    latents = draw_latents(model, [0], std=1.0, seed=0)
    for options, words in (({"frames": 1}, "at least 2"), ({"space": "x"}, "space"), ({"mode": "line"}, "mode")):
        with pytest.raises(ValueError, match=words):
            next(interpolate(model, latents, latents, **{"frames": 2} | options))


def test_models_without_an_endblock(images: torch.Tensor) -> None:
    flow = Brightness()
    ends = [latents_of(flow, image[None]) for image in images[:2]]
    first, last = interpolate(flow, *ends, 2)
    assert torch.equal(torch.cat([first, last]), images[:2])
    with pytest.raises(ValueError, match="Brightness has no endblock"):
        next(interpolate(flow, *ends, 2, space="y"))


def test_there_and_back() -> None:
    assert list(there_and_back(iter("abcd"))) == list("abcdcb")
    assert list(there_and_back(iter("ab"))) == list("ab")
