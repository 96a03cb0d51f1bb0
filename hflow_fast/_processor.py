"""What this computer's processor is good at."""

from __future__ import annotations

import torch

__all__ = ["CONVOLVES_CHANNELS_LAST"]

CONVOLVES_CHANNELS_LAST = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
"""Whether convolutions compute in channels_last, quicker in both directions, and reorder what comes in another order to
it and back. With AVX2, channels_last is slower in the backward pass."""
