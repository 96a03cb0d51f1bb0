"""What the sections of a configuration have in common: checked fields, and one error that lists every mistake."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ..errors import ConfigError

__all__ = ["Section"]

_MESSAGES = {
    "extra_forbidden": "unknown key; remove it or correct its spelling",
    "missing": "missing key; add it (the presets show every key)",
}


class Section(BaseModel):
    """Immutable; JSON keys are the fields' names in capitals; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=str.upper)

    @classmethod
    def parse(cls, data: Any, name: str) -> Self:
        """The section from what stands in the file under ``name`` (may be empty).

        Raises:
            ConfigError: one line for every key that is unknown, missing or inconsistent.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = (_explain(problem, name) for problem in error.errors(include_url=False))
            raise ConfigError("\n".join(lines)) from None


def _explain(problem: Any, name: str) -> str:
    key = ".".join(map(str, [*([name] if name else []), *problem["loc"]]))
    message = _MESSAGES.get(problem["type"])
    if message is None:
        message = problem["msg"].removeprefix("Value error, ")
        if not isinstance(problem["input"], dict):
            message += f" (got {problem['input']!r})"
    return f"{key}: {message}"
