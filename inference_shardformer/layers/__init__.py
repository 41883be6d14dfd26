"""Parallel and plain building blocks of a decoder."""
