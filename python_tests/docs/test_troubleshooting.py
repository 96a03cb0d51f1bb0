"""The messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def _texts() -> str:
    """Every string in the code, f-strings with … for what is filled in, one per line."""
    lines = []
    for path in [ROOT / "setup.py", *(ROOT / "hflow_fast").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                lines.append(" ".join("".join(map(str, parts)).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(" ".join(re.sub(r"%[\w.]+", "…", node.value).split()))
    return "\n".join(lines)


TEXTS = _texts()


@pytest.mark.parametrize("message", [line for block in QUOTED for line in block.splitlines()])
def test_message_is_in_the_code(message):
    if message.startswith("…: ") and message[3:] in TEXTS:
        return  # a prefix that is put before it elsewhere
    assert message in TEXTS
