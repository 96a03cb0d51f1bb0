"""HFlow computes its 3×3 convolutions by our kernel where that is quicker."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hflow_fast.configs import load_config
from hflow_fast.models import HFlow, precision

from .calls import Calls

WIDTH = 32


def wide_model() -> HFlow:
    config = load_config("tiny-16")
    model = config["MODEL_PARAMETERS"]
    for key in ("ENCODER_CHANNELS", "DECODER_CHANNELS", "RNVP_CHANNELS"):
        model[key] = [WIDTH] * len(model[key])
    return HFlow.from_config(config)


def work(model: HFlow, images: torch.Tensor) -> tuple[float, torch.Tensor, Calls]:
    """The loss, all gradients in one, and the operations that were called."""
    model.zero_grad()
    with Calls() as calls:
        loss = model.loss(images, noise=False).mean()
        loss.backward()
    return float(loss.detach()), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), calls


def test_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16) - 0.5
    model = wide_model().set_precision("fp32", channels_last=True)
    model.initialize(images)
    loss, gradients, calls = work(model, images)
    monkeypatch.setattr(precision, "conv3x3", lambda x, weight, bias, groups: F.conv2d(
        x, weight, bias, padding=1, groups=groups))
    expected_loss, expected, library = work(model, images)
    assert calls.count["conv3x3_fwd"] == calls.count["conv3x3_bwd"] > 10
    assert calls.count["conv3x3_fwd"] == library.count["convolution"] - calls.count["convolution"]
    assert abs(loss - expected_loss) < 1e-5 * abs(expected_loss)
    assert (gradients - expected).norm() < 3e-3 * expected.norm()


def test_format_of_a_processor(monkeypatch):
    """Channels_last, which the kernel reads, wherever it has vectors; elsewhere what suits PyTorch's convolutions."""
    model = wide_model()
    for quick, torchs, expected in ((True, False, True), (False, True, True), (False, False, False)):
        monkeypatch.setattr(precision, "is_quick", lambda quick=quick: quick)
        monkeypatch.setattr(precision, "CONVOLVES_CHANNELS_LAST", torchs)
        weight = model.set_precision(None).code_encoder.to_2x2.first.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is expected
        assert precision.defaults(weight.device) == ("fp32", torchs)
