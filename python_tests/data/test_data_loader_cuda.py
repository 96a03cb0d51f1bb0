"""The loader on a GPU: copies beside the computation, in order, and out of the way of a graph's capture."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hflow_fast.data import Batches, ImageDataset, Loader, create_dataset

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "images").mkdir()
    for i in range(26):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
    return create_dataset(folder / "images", folder / "dataset", 64, held_out=0.1)


def test_every_step_is_whole_while_the_device_is_behind(dataset: ImageDataset):
    loader, batches = Loader(dataset.train, Batches(23, 6), 2, device="cuda"), Batches(23, 6)
    kept = []
    for _ in range(50):
        torch.cuda._sleep(5_000_000)  # the copies of the next steps must not wait for it, nor overtake what reads these
        kept.append([part.clone() for part in next(loader)])
    loader.close()
    for step in kept:
        for part, index in zip(step, next(batches).split(2)):
            assert torch.equal(part.cpu(), dataset.train[index])


def test_a_graph_can_be_captured_while_threads_read(dataset: ImageDataset):
    loader = Loader(dataset.train, Batches(23, 6), 2, device="cuda", ahead=6)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
    next(loader)
    with torch.cuda.graph(graph):
        y = x + 1
        time.sleep(0.05)
    next(loader)
    loader.close()
    graph.replay()
    assert y.eq(1).all()
