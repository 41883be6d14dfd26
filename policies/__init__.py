"""Sharding policies, one file per model family."""
