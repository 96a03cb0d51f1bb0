"""Training: configuration, loop, checkpoints and the directory of a run."""

from __future__ import annotations

from .adamax import Adamax
from .checkpoint import load_model, read_checkpoint, save_checkpoint
from .config import GeneralConfig, OutputConfig, TrainConfig
from .distributed import RankError, Ranks, process_group
from .evaluation import likelihood_bounds
from .log import read_metrics
from .run import RunDirectory
from .session import Session, TrainingError
from .trainer import Trainer

__all__ = [
    "Adamax",
    "GeneralConfig",
    "OutputConfig",
    "RankError",
    "Ranks",
    "RunDirectory",
    "Session",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "likelihood_bounds",
    "load_model",
    "process_group",
    "read_checkpoint",
    "read_metrics",
    "save_checkpoint",
]
