from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hflow_fast import ConfigError
from hflow_fast.inference import draw_latents, draw_samples, model_fingerprint, sampling, write_samples
from hflow_fast.inference.images import read_png
from hflow_fast.models import HFlow


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_sample_depends_on_seed_and_index_alone(model: HFlow) -> None:
    together = draw_latents(model, range(6), std=0.7, seed=3)
    assert [latent.shape[1:] for latent in together] == [torch.Size(shape) for shape in model.latent_shapes]
    before = torch.get_rng_state()
    for index in (5, 0, 3):
        alone = draw_latents(model, [index], std=0.7, seed=3)
        assert all(torch.equal(one[0], many[index]) for one, many in zip(alone, together))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_samples_are_alike(model: HFlow) -> None:
    # 2³² apart: a generator that keeps 32 bits of its seed would repeat itself.
    everything = [draw_latents(model, [index], std=1.0, seed=seed)[-1]
                  for seed in (0, 1, 2**32) for index in (0, 1, 2**32)]
    assert len({tuple(latent.flatten().tolist()) for latent in everything}) == 9


def test_latents_are_normal_with_the_std_of_their_level(model: HFlow) -> None:
    prior = model.latent_stds(1.0)
    stds = [0.3, 0.9, 0.5]
    for given, wanted in ((0.6, [0.6, 0.6, 1.0]), (stds[:2], [0.3, 0.9, 1.0]), (tuple(stds), stds)):
        for latent, factor, scale in zip(draw_latents(model, range(300), std=given, seed=0), wanted, prior):
            count = latent.numel()
            assert abs(latent.mean()) < 4 * factor * scale / count**0.5
            assert abs(latent.std() / (factor * scale) - 1) < 4 / (2 * count) ** 0.5
            assert abs(latent.div(factor * scale).pow(4).mean() / 3 - 1) < 4 * (96 / 9 / count) ** 0.5
    for wrong in ([0.5], [0.5] * 4, -0.1, [0.5, float("nan")]):
        with pytest.raises(ValueError, match="finest first"):
            draw_latents(model, [0], std=wrong, seed=0)


def test_batches_make_no_difference(model: HFlow) -> None:
    whole = draw_samples(model, 7, std=0.8, seed=1, batch_size=16)
    assert whole.shape == (7, 3, 16, 16) and whole.dtype == torch.uint8
    for batch_size in (1, 3):
        parts = draw_samples(model, 7, std=0.8, seed=1, batch_size=batch_size)
        assert (parts.int() - whole.int()).abs().max() <= 1  # a value at the edge of two steps can round to either
        assert (parts == whole).float().mean() > 0.999
    assert torch.equal(draw_samples(model, [6, 2], std=0.8, seed=1), whole[[6, 2]])
    assert draw_samples(model, 0, std=0.8, seed=1).shape == (0, 3, 16, 16)


def test_files_go_on_where_they_stopped(model: HFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert write_samples(model, whole, 9, std=0.8, seed=2, batch_size=4) == 9
    expected = draw_samples(model, 9, std=0.8, seed=2)
    assert torch.equal(torch.stack([read_png(whole / f"{index:06d}.png") for index in range(9)]), expected)

    real, calls = sampling.draw_samples, []

    def fail_third(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(sampling, "draw_samples", fail_third)
    with pytest.raises(KeyboardInterrupt):
        write_samples(model, torn, 9, std=0.8, seed=2, batch_size=4)
    assert set(contents(torn)) == {"samples.json", *(f"{index:06d}.png" for index in range(8))}
    (torn / ".000008.png.tmp").write_bytes(b"torn")  # what SIGKILL in the middle of a file would leave
    monkeypatch.undo()
    assert write_samples(model, torn, 9, std=0.8, seed=2, batch_size=4) == 1
    assert contents(torn) == contents(whole)
    assert write_samples(model, torn, 9, std=0.8, seed=2) == 0
    assert write_samples(model, torn, 11, std=[0.8, 0.8], seed=2) == 2
    assert contents(torn).items() >= {name: data for name, data in contents(whole).items() if name != "grid.png"}.items()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_work(model: HFlow, tmp_path: Path, order: tuple[int, ...]) -> None:
    write_samples(model, tmp_path / "one", 10, std=0.8, seed=0, batch_size=1)
    counts = [write_samples(model, tmp_path / "three", 10, std=0.8, seed=0, batch_size=1, rank=rank, world_size=3)
              for rank in order]
    assert sum(counts) == 10 and max(counts) - min(counts) <= 1
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_folders_of_others_are_left_alone(model: HFlow, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "grid.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_samples(model, mine, 2, std=0.8, seed=0)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        write_samples(model, tmp_path / "file", 2, std=0.8, seed=0)

    samples = tmp_path / "samples"
    write_samples(model, samples, 2, std=0.8, seed=0)
    before = contents(samples)
    for options, words in (({"seed": 1}, "seed 0 instead of 1"), ({"std": 0.5}, "std .* instead of")):
        with pytest.raises(ConfigError, match=words):
            write_samples(model, samples, 2, **{"std": 0.8, "seed": 0} | options)
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match="another model's"):
        write_samples(HFlow.from_config("tiny-16"), samples, 2, std=0.8, seed=0)
    assert contents(samples) == before and contents(mine) == {"grid.png": b"mine"}
    (samples / "samples.json").write_text("[")
    with pytest.raises(ConfigError, match="damaged"):
        write_samples(model, samples, 2, std=0.8, seed=0)


def test_the_grid_shows_the_first_64(model: HFlow, tmp_path: Path) -> None:
    write_samples(model, tmp_path, 70, std=0.8, seed=0, batch_size=70)
    grid = read_png(tmp_path / "grid.png")
    assert grid.shape == (3, 8 * 98 + 2, 8 * 98 + 2)
    last = grid[:, -98:-2, -98:-2][:, ::6, ::6]
    assert torch.equal(last, read_png(tmp_path / "000063.png"))


def test_a_full_disk_is_an_error(model: HFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: torch.Tensor, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling, "save_png", full)
    with pytest.raises(OSError, match="No space"):
        write_samples(model, tmp_path, 2, std=0.8, seed=0)


def test_fingerprints_tell_models_apart(model: HFlow) -> None:
    same, other = HFlow.from_config("tiny-16"), HFlow.from_config("tiny-16")
    same.load_state_dict(model.state_dict())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[-1] += 1e-6
    assert model_fingerprint(same) == model_fingerprint(model) != model_fingerprint(other)
    assert len(model_fingerprint(model)) == 64
    assert model_fingerprint(same.bfloat16()) != model_fingerprint(model)
