"""HFlow: the hierarchical flow of "Invertible Hierarchical Generative Model for Images" (TMLR 2023)."""

from ..bound import LevelTerms, LikelihoodBound
from .config import EndblockConfig, HFlowConfig
from .model import HFlow
from .noise import Noise

__all__ = ["EndblockConfig", "HFlow", "HFlowConfig", "LevelTerms", "LikelihoodBound", "Noise"]
