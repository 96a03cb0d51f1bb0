"""Studies of the latent hierarchy, as in "Invertible Hierarchical Generative Model for Images" (TMLR 2023).

Each is a function from a model to tensors; ``hflow-fast study`` draws them. They use a model's ``encode``, ``decode``,
``latent_shapes`` and ``latent_stds`` and nothing else of it.
"""

from __future__ import annotations

from .hold import hold_levels
from .latents import level_names
from .pictures import labelled_grid, save_heat_maps
from .randomize import randomize_levels
from .seeds import seed_samples
from .walk import random_walk, walk_latents
from .zero import zero_levels

__all__ = [
    "hold_levels",
    "labelled_grid",
    "level_names",
    "random_walk",
    "randomize_levels",
    "save_heat_maps",
    "seed_samples",
    "walk_latents",
    "zero_levels",
]
