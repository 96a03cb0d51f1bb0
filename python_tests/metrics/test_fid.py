"""The Fréchet distance, feature extractors and the cache of a dataset's features."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hflow_fast.data import ImageDataset
from hflow_fast.errors import CheckpointError, ConfigError, DatasetError
from hflow_fast.metrics import FeatureExtractor, default_cache, fid_of_images, fid_of_model
from training.tiny import SIZE, TinyFlow


class Blocks(nn.Module):
    """Means of 4 × 4 blocks: 12 features of an 8 × 8 image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.tensor(255.0))
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return nn.functional.avg_pool2d(images / self.unit, 4).flatten(1)


class Inception(nn.Module):
    """The arguments of StyleGAN's."""

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        features = nn.functional.avg_pool2d(img.float(), 4).flatten(1)
        return features if return_features else features[:, :2]


def make_dataset(path: Path, pixels: np.ndarray, held_out: list[int]) -> ImageDataset:
    path.mkdir()
    np.save(path / "images.npy", pixels)
    recipe = {"source_fingerprint": "", "resolution": pixels.shape[1], "split": "content", "held_out_fraction": 0.25,
              "seed": 0}
    (path / "dataset.json").write_text(json.dumps({
        "recipe": recipe, "source": "made up", "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "names": list(map(str, range(len(pixels)))), "held_out": held_out, "skipped": []}))
    return ImageDataset.open(path)


@pytest.fixture
def pixels() -> np.ndarray:
    """Images of correlated colour patches."""
    random = np.random.default_rng(0)
    patches = 128 + 20 * random.standard_normal((80, 2, 2, 3)) @ random.standard_normal((3, 3))
    return patches.repeat(4, axis=1).repeat(4, axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path: Path, pixels: np.ndarray) -> ImageDataset:
    return make_dataset(tmp_path / "data", pixels, list(range(20)))


@pytest.fixture
def model() -> TinyFlow:
    torch.manual_seed(0)
    return TinyFlow().eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """The closed form by symmetric eigenvalues; features (N, F), float64."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross)


def test_it_is_the_frechet_distance_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8, generator=generator)
    second = torch.randint(0, 200, (90, 3, 8, 8), dtype=torch.uint8, generator=generator)
    fid = fid_of_images(first, second, FeatureExtractor(Blocks()), batch_size=32)
    assert (fid.real, fid.generated, fid.features) == (70, 90, 12)
    assert fid.value == pytest.approx(frechet(Blocks()(first).double(), Blocks()(second).double()), rel=1e-9)


def test_halves_are_close_and_shifted_images_far(pixels: np.ndarray) -> None:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) // 2
    extractor = FeatureExtractor(Blocks())
    halves = fid_of_images(images[::2], images[1::2], extractor).value
    shifted = fid_of_images(images, images + 100, extractor).value
    assert shifted == pytest.approx(12 * (100 / 255) ** 2, rel=1e-4) and 0 < halves < shifted / 100
    assert fid_of_images(images, images, extractor).value == pytest.approx(0, abs=1e-8)


def test_a_model_against_a_dataset(model: TinyFlow, dataset: ImageDataset) -> None:
    extractor = FeatureExtractor(Blocks())
    fid = fid_of_model(model, dataset, extractor, n=40, std=0.3, seed=1)
    assert (fid.real, fid.generated, fid.features, fid.caution) == (40, 40, 12, None)
    batches = fid_of_model(model, dataset, extractor, n=40, std=0.3, seed=1, batch_size=7)
    assert batches.value == pytest.approx(fid.value, rel=1e-6)
    assert fid_of_model(model, dataset, extractor, n=40, std=0.3, seed=2).value != pytest.approx(fid.value, rel=1e-3)
    few = fid_of_model(model, dataset, extractor, n=12, std=0.3, split="held_out")
    assert (few.real, few.generated) == (12, 12) and "12 images have a singular covariance of 12" in few.caution
    assert fid_of_model(model, dataset, extractor, n=30, std=0.3, split="held_out").real == 20


def test_features_of_the_dataset_are_computed_once(model: TinyFlow, dataset: ImageDataset, tmp_path: Path) -> None:
    options = {"n": 50, "std": 0.3, "cache": tmp_path / "cache"}
    network = Blocks()
    counts: list[int] = []
    first = fid_of_model(model, dataset, FeatureExtractor(network, key="blocks"), **options, progress=counts.append)
    assert network.images == sum(counts) == 100
    again = fid_of_model(model, dataset, FeatureExtractor(network, key="blocks"), **options, progress=counts.append)
    assert network.images == sum(counts) == 150 and again == first

    # Anything else that the features depend on is another file.
    other = make_dataset(tmp_path / "other", np.load(dataset.path / "images.npy") // 2, list(range(20)))
    for arguments in ({"dataset": other}, {"n": 10}, {"split": "held_out", "n": 50}, {"extractor": "another"}):
        network.images = 0
        extractor = FeatureExtractor(network, key=arguments.pop("extractor", "blocks"))
        fid = fid_of_model(model, arguments.pop("dataset", dataset), extractor, **options | arguments)
        assert network.images == fid.real + fid.generated
    assert len(list((tmp_path / "cache").iterdir())) == 5

    unnamed = fid_of_model(model, dataset, FeatureExtractor(network), **options)
    assert unnamed == first and len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("damage", ["flipped", "cut", "renamed"])
def test_damaged_features_are_computed_again(
    model: TinyFlow, dataset: ImageDataset, tmp_path: Path, damage: str
) -> None:
    def value() -> float:
        return fid_of_model(model, dataset, FeatureExtractor(Blocks(), key="k"), n=50, std=0.3, cache=tmp_path / "c").value

    expected = value()
    (file,) = (tmp_path / "c").iterdir()
    data = file.read_bytes()
    if damage == "renamed":  # what another dataset's file would be under this name
        fid_of_model(model, dataset, FeatureExtractor(Blocks(), key="l"), n=50, std=0.3, cache=tmp_path / "d")
        data = next((tmp_path / "d").iterdir()).read_bytes()
    elif damage == "cut":
        data = data[:-5]
    else:
        data = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        assert value() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value() == expected  # it has been repaired


def test_a_cache_that_cannot_be_written_is_no_obstacle(model: TinyFlow, dataset: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    extractor = FeatureExtractor(Blocks(), key="k")
    with pytest.warns(UserWarning, match="not written"):
        fid = fid_of_model(model, dataset, extractor, n=50, std=0.3, cache=tmp_path / "file" / "cache")
    assert fid.value > 0


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "hflow_fast" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "hflow_fast" / "features"


def test_torchscript_files(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    for network, expected in ((Blocks(), Blocks()(images)), (Inception(), Inception()(images, return_features=True))):
        file = tmp_path / f"{type(network).__name__}.pt"
        torch.jit.save(torch.jit.script(network), file)
        extractor = FeatureExtractor.load(file)
        torch.testing.assert_close(extractor(images), expected.double())
        assert extractor.key == hashlib.sha256(file.read_bytes()).hexdigest()
        torch.testing.assert_close(FeatureExtractor(network)(images), expected.double())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda images: images.float(), r"\(N, F\).*\(5, 3, 8, 8\)"),
        (lambda images: [images], "it gave list"),
        (lambda images: images.float().mean((1, 2, 3)).log().log()[:, None], "not finite"),
        (lambda images: images.float() @ torch.ones(3, 3), "does not take images"),
    ],
)
def test_unfit_networks_are_refused(network: object, message: str) -> None:
    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return network(images)

    with pytest.raises(CheckpointError, match=message):
        FeatureExtractor(Network())(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01.", b"PK\x03\x04 torn"])
def test_unfit_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "network.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="network.pt.*TorchScript"):
        FeatureExtractor.load(file)


def test_unfit_datasets_are_refused(model: TinyFlow, dataset: ImageDataset, tmp_path: Path) -> None:
    large = make_dataset(tmp_path / "large", np.zeros((4, 16, 16, 3), np.uint8), [0])
    with pytest.raises(DatasetError, match=f"16 × 16.*{SIZE} × {SIZE}"):
        fid_of_model(model, large, FeatureExtractor(Blocks()), n=4, std=1)
    single = make_dataset(tmp_path / "single", np.zeros((4, SIZE, SIZE, 3), np.uint8), [0])
    with pytest.raises(DatasetError, match="1 images in held_out"):
        fid_of_model(model, single, FeatureExtractor(Blocks()), n=4, std=1, split="held_out")


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"pip install 'hflow_fast\[fid\]'"):
        fid_of_images(images, images, FeatureExtractor(Blocks()))
