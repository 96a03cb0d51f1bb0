"""Complete models built on the fused layers."""

from .hflow import HFlow, HFlowConfig

__all__ = ["HFlow", "HFlowConfig"]
