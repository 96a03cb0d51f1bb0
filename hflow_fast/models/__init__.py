"""Complete models built on the fused layers."""

from .hflow import HFlow, HFlowConfig, Noise

__all__ = ["HFlow", "HFlowConfig", "Noise"]
