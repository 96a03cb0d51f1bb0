"""What this computer's processor is good at."""

from __future__ import annotations

import torch

__all__ = ["CONVOLVES_CHANNELS_LAST", "HAS_BFLOAT16"]

CONVOLVES_CHANNELS_LAST = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
"""Whether convolutions compute in channels_last, quicker in both directions, and reorder what comes in another order to
it and back. With AVX2, channels_last is slower in the backward pass."""

HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether it has instructions for bfloat16 that oneDNN uses."""
