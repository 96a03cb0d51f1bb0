"""The errors a user can cause. All are ``ValueError``s whose text says what to do."""

__all__ = ["CheckpointError", "ConfigError", "DatasetError"]


class ConfigError(ValueError):
    """A configuration has an unknown, missing or inconsistent key."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class DatasetError(ValueError):
    """Images or a dataset cannot be read, or do not fit the model."""
