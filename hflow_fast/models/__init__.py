"""Complete models built on the fused layers."""

from .bound import LevelTerms, LikelihoodBound
from .building import build_model
from .glow import Glow, GlowConfig
from .hflow import HFlow, HFlowConfig, Noise

__all__ = [
    "Glow", "GlowConfig", "HFlow", "HFlowConfig", "LevelTerms", "LikelihoodBound", "Noise", "build_model",
]
