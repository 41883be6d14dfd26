"""Ranks that are threads of one process: turns, collectives and guard that behave as those of real ranks."""
