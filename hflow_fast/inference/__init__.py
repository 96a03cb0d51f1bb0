"""What a trained model is used for: samples, reconstructions and pictures of them."""

from __future__ import annotations

from .identity import model_fingerprint
from .images import image_grid, save_png
from .reconstruction import reconstruct
from .sampling import draw_latents, draw_samples, write_samples

__all__ = ["draw_latents", "draw_samples", "image_grid", "model_fingerprint", "reconstruct", "save_png",
           "write_samples"]
