"""Hooks on modules, which only a call of the module itself runs."""

from __future__ import annotations

from torch import nn

__all__ = ["HOOKS", "is_watched"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps them."""


def is_watched(module: nn.Module) -> bool:
    """Whether there are hooks on the module itself."""
    return any(getattr(module, hooks) for hooks in HOOKS)
