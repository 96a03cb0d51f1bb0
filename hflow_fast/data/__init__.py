"""Image datasets: making them, reading them, and turning 8-bit pixels into continuous data."""

from __future__ import annotations

from .batches import Batches
from .create import create_dataset
from .dataset import ImageDataset, Images
from .dequantize import dequantize, from_uint8, to_uint8

__all__ = ["Batches", "ImageDataset", "Images", "create_dataset", "dequantize", "from_uint8", "to_uint8"]
