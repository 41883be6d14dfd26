"""Errors of tuning; part of the tree in `inference_shardformer.errors`."""

from __future__ import annotations

from inference_shardformer.errors import ConfigError


class TuningProfileError(ConfigError):
    """A tuning profile is missing, unreadable, edited, stale, or made for other shapes."""

    code = "tuning_profile"
