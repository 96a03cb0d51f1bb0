"""The fused layers for code written with normflows, FrEIA, nflows or one of the PyTorch ports of Glow."""

from .accelerate import AccelerationReport, LeftLayer, Match, ReplacedLayer, accelerate, restore

__all__ = ["AccelerationReport", "LeftLayer", "Match", "ReplacedLayer", "accelerate", "restore"]
