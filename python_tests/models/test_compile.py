"""torch.compile takes the model whole: fullgraph fails at the first break."""

from __future__ import annotations

import torch

from hflow_fast.models import HFlow


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


def test_training_of_a_loaded_model(tiny_model, images):
    """That its actnorms are initialised it knows from loading, without asking a tensor."""
    model = HFlow.from_config("tiny-16").train()
    model.load_state_dict(tiny_model.state_dict())
    losses = []
    for loss in (compiled(model.loss), model.loss):
        torch.manual_seed(0)
        losses.append(loss(images))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_in_bf16(tiny_model, images):
    tiny_model.eval().set_precision("bf16")
    latents, _ = tiny_model.encode(images)
    torch.testing.assert_close(compiled(tiny_model.decode)(latents)[0], images, rtol=0, atol=1e-6)
