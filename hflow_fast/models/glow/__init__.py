"""Glow: "Generative Flow with Invertible 1x1 Convolutions" (Kingma & Dhariwal, NeurIPS 2018)."""

from .config import GlowConfig
from .model import Glow

__all__ = ["Glow", "GlowConfig"]
