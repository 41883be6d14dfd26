"""Attention backends, their contract and their selection."""
