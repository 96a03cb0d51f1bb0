"""Complete models built on the fused layers."""

from .glow import Glow, GlowConfig
from .hflow import HFlow, HFlowConfig, Noise

__all__ = ["Glow", "GlowConfig", "HFlow", "HFlowConfig", "Noise"]
