"""The studies of the latent hierarchy, on a model with two levels and a code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_fast.data import to_uint8
from hflow_fast.inference import draw_latents, draw_samples, latents_of, studies
from hflow_fast.models import HFlow


def decode(model: HFlow, latents: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return model.decode(latents)[0]


def assert_same_images(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one step of a pixel's value, which rounding can make of other batch sizes."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.uint8
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_levels_have_names(model: HFlow) -> None:
    assert studies.level_names(model) == ["16", "8", "code"]


def test_randomized_levels(model: HFlow, images: Tensor) -> None:
    counts: list[int] = []
    maps = studies.randomize_levels(model, images[:2], draws=4, std=0.7, seed=3, batch_size=3, progress=counts.append)
    assert maps.shape == (3, 2, 16, 16) and sum(counts) == 3 * 2 * 4
    fresh = draw_latents(model, range(4), std=0.7, seed=3)
    for image in range(2):
        for level in range(3):
            latents = [latent.expand(4, -1, -1, -1) for latent in latents_of(model, images[image:image + 1])]
            latents[level] = fresh[level]
            spread = decode(model, latents).clamp(-0.5, 0.5).numpy().std(axis=0, ddof=1).mean(axis=0)
            np.testing.assert_allclose(maps[level, image].numpy(), spread, atol=1e-5)
    assert (maps.amax((1, 2, 3)) > 1e-3).all()
    with pytest.raises(ValueError, match="2 draws"):
        studies.randomize_levels(model, images, draws=1)


@pytest.mark.parametrize("start", ["finest", "coarsest"])
def test_zeroed_levels(model: HFlow, images: Tensor, start: str) -> None:
    steps = studies.zero_levels(model, images, start=start, batch_size=2)
    assert steps.shape == (4, *images.shape)
    assert_same_images(steps[0], images)
    latents = latents_of(model, images)
    for step, silent in enumerate([(), (0,), (0, 1), (0, 1, 2)] if start == "finest" else [(), (2,), (2, 1), (2, 1, 0)]):
        mixed = [torch.zeros_like(latent) if level in silent else latent for level, latent in enumerate(latents)]
        assert_same_images(steps[step], to_uint8(decode(model, mixed)))
    assert_same_images(steps[3], steps[3][:1].expand_as(images))  # nothing is left of the images


@pytest.mark.parametrize("keep", ["coarse", "fine"])
def test_held_levels(model: HFlow, images: Tensor, keep: str) -> None:
    samples = studies.hold_levels(model, images[:2], keep=keep, draws=3, std=0.6, seed=1, batch_size=2)
    assert samples.shape == (2, 2, 3, 3, 16, 16)
    fresh = draw_latents(model, range(3), std=0.6, seed=1)
    for image in range(2):
        own = [latent.expand(3, -1, -1, -1) for latent in latents_of(model, images[image:image + 1])]
        for cut in (1, 2):
            upper, lower = (fresh, own) if keep == "coarse" else (own, fresh)
            assert_same_images(samples[image, cut - 1], to_uint8(decode(model, upper[:cut] + lower[cut:])))
    assert (samples[:, :, 0] != samples[:, :, 1]).any()


def test_seeds_at_several_stds(model: HFlow) -> None:
    samples = studies.seed_samples(model, [5, 2], [0.4, (0.1, 0.9)], batch_size=1)
    assert samples.shape == (2, 2, 3, 16, 16)
    for row, std in enumerate([0.4, (0.1, 0.9)]):
        for column, seed in enumerate([5, 2]):
            assert_same_images(samples[row, column], draw_samples(model, 1, std=std, seed=seed)[0])


def walk(model: HFlow, **options: object) -> list[Tensor]:
    """One tensor (frames, count, C, H, W) for each level."""
    return [torch.stack(frames) for frames in zip(*studies.walk_latents(model, **options))]


def test_a_walk_is_smooth_and_comes_back(model: HFlow) -> None:
    for level in walk(model, frames=90, count=40, seed=1, turns=2):
        steps = (level - level.roll(1, 0)).flatten(1).norm(dim=1)  # the first one is that from the last frame
        assert steps.max() < 1.3 * steps.min()
        turns = (level.roll(-1, 0) - 2 * level + level.roll(1, 0)).flatten(1).norm(dim=1)
        assert turns.max() < 0.3 * steps.max()
        assert (level[0] - level[45]).norm() > 5 * steps.max()  # and it does go somewhere


def test_every_frame_of_a_walk_is_a_sample_of_the_prior(model: HFlow) -> None:
    std = (0.5, 0.8, 0.3)
    for steps in (1.0, (0.2, 0.7, 1.0)):
        for level, expected in zip(walk(model, frames=7, count=200, std=std, steps=steps), std):
            for frame in level:
                count = frame.numel()
                assert abs(frame.mean()) < 5 * expected / math.sqrt(count)
                assert frame.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))


def test_levels_of_a_walk_move_by_their_steps(model: HFlow) -> None:
    finest, middle, code = walk(model, frames=20, count=50, std=(1.0, 1.0, 1.0), steps=(0.0, 0.5, 1.0))
    assert torch.equal(finest, finest[:1].expand_as(finest)) and finest.std() > 0.9
    speeds = [(level - level.roll(1, 0)).square().mean().sqrt() for level in (middle, code)]
    assert float(speeds[0] / speeds[1]) == pytest.approx(0.5, rel=0.05)
    slow = walk(model, frames=20, count=50, std=(1.0, 1.0, 1.0), turns=1)[2]
    assert (slow - slow.roll(1, 0)).square().mean().sqrt() < 0.6 * speeds[1]


def test_frames_of_a_walk_are_the_images_of_its_latents(model: HFlow) -> None:
    options = {"frames": 3, "count": 2, "std": 0.6, "seed": 4}
    frames = list(studies.random_walk(model, **options, batch_size=1))
    for frame, latents in zip(frames, studies.walk_latents(model, **options), strict=True):
        assert_same_images(frame, to_uint8(decode(model, latents)))
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize("steps", [(1.0, 1.0), 1.5, (0.5, -0.1, 0.5)])
def test_wrong_steps_are_refused(model: HFlow, steps: object) -> None:
    with pytest.raises(ValueError, match="steps must be one number or 3"):
        next(studies.walk_latents(model, frames=2, steps=steps))


def test_no_study_keeps_a_graph_or_touches_the_random_state(model: HFlow, images: Tensor) -> None:
    before = torch.get_rng_state()
    results = [studies.randomize_levels(model, images[:1], draws=2), studies.zero_levels(model, images[:1]),
               studies.hold_levels(model, images[:1]), studies.seed_samples(model, [0], [1.0]),
               *studies.random_walk(model, frames=2)]
    assert torch.equal(torch.get_rng_state(), before) and not any(result.requires_grad for result in results)
