"""Counting the operations that torch dispatches."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

# Views, bookkeeping and allocations: they start no kernel.
_FREE = frozenset("""
    view t transpose slice split split_with_sizes chunk expand detach select unsqueeze squeeze unbind permute as_strided
    alias _unsafe_view _reshape_alias lift_fresh empty empty_like empty_strided new_empty new_empty_strided is_same_size
    """.split())


class Calls(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def work(self) -> int:
        """How many of them compute something: at least as many kernels on a GPU."""
        return sum(count for name, count in self.count.items() if name not in _FREE)
