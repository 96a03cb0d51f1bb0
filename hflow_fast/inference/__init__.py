"""What a trained model is used for: samples, reconstructions and pictures of them."""

from __future__ import annotations

from .images import draw_samples, image_grid, reconstruct, save_png

__all__ = ["draw_samples", "image_grid", "reconstruct", "save_png"]
