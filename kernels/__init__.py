"""Kernels and their plain-torch references."""
