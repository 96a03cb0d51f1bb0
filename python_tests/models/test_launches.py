"""How many operations one micro-batch of A-128 takes: fewer than 3,900, where the original's takes 13,481.

Counted alike on a processor, without views and allocations; the original dispatches 17,000 with them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hflow_fast.configs import load_config
from hflow_fast.models import HFlow, Noise

from .calls import Calls


def narrow_a128() -> dict[str, Any]:
    """A-128 with every layer, but few channels."""
    config = load_config("A-128")
    model = config["MODEL_PARAMETERS"]
    for key in ("ENCODER_CHANNELS", "DECODER_CHANNELS", "RNVP_CHANNELS", "COND_OUT_C", "SKIPS_CHANNELS"):
        model[key] = [8] * len(model[key])
    model["GLOBAL_NET_CHANNELS"] = 16
    endblock = model["ENDBLOCK_SETTINGS"]
    endblock |= {"RNVP_CHANNELS": [8, 8], "COND_OUTPUT_CHANNELS": [-1, 8], "MASK_FOR_BASE_IND": [0, 16]}
    endblock |= dict.fromkeys(("ENDBLOCK_TOT_CHANNELS", "AUTOENCODER_CHANNELS", "GLOBAL_STATE_HIDDEN_CHANNELS"), 16)
    return config


@pytest.fixture(scope="module")
def counts() -> dict[str, Calls]:
    torch.manual_seed(0)
    model = HFlow.from_config(narrow_a128())
    images = torch.rand(2, 3, 128, 128) - 0.5
    model.initialize(images)
    counts = {name: Calls() for name in ("begin", "forward", "backward", "end", "sampling")}
    block = model.prepared()
    with counts["begin"]:
        block.__enter__()
    for _ in range(2):  # the second finds gradients to add to
        counts["forward"].count.clear()
        counts["backward"].count.clear()
        with counts["forward"]:
            loss = model.loss(images).mean()
        with counts["backward"]:
            loss.backward()
    with counts["end"]:
        block.__exit__(None, None, None)
    model.sample(1)
    with counts["sampling"]:
        model.sample(1)
    return counts


@pytest.mark.parametrize(("part", "limit"), [
    ("begin", 340), ("forward", 1720), ("backward", 2040), ("end", 165), ("sampling", 1510),
])  # fmt: skip
def test_operations(counts, part, limit):
    """Once per optimizer step "begin" and "end", which are mostly concatenations of small weights and the rotations."""
    assert limit * 0.95 < counts[part].work <= limit, counts[part].count.most_common()


def test_merged_passes_take_hardly_more_operations_than_one(counts):
    """A micro-batch of A-128 as one of four that run together then takes about a quarter: fewer than 1,000."""
    torch.manual_seed(0)
    model = HFlow.from_config(narrow_a128())
    images = torch.rand(4, 3, 128, 128) - 0.5
    model.initialize(images)
    merged = Calls()
    with model.prepared():
        model.loss(images).mean().backward()  # leaves gradients to add to
        with merged:
            model.loss(images, Noise([torch.Generator() for _ in range(4)])).mean().backward()
    one = counts["forward"].work + counts["backward"].work
    assert one <= merged.work < 1.06 * one, (one, merged.work)


def test_the_pieces_are_whole(counts):
    """Nothing is taken apart and put together again: one convolution, one gradient of it, one step of the flow."""
    forward, backward = counts["forward"].count, counts["backward"].count
    assert backward["convolution_backward"] == forward["convolution"]
    assert forward["flow_step_fwd"] == backward["flow_step_bwd"] == 48
    assert not forward["_foreach_mul"] and not forward["lu_many_fwd"]
    assert not backward["select_backward"]
    assert backward["add_"] == 1  # the decoder's first canvas is a parameter that is used as it is
