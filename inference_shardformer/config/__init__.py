"""Typed configuration: models, layers, resolution."""
