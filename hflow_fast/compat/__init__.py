"""Files of other implementations: the original HFlow's checkpoints, read without running anything in them."""

from __future__ import annotations

from .importing import Imported, import_file, import_original
from .original_file import OriginalFile, read_original

__all__ = ["Imported", "OriginalFile", "import_file", "import_original", "read_original"]
