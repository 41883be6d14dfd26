"""The sections of scripts/gpu_check.py, each usable on any device, so that all of them are tested without a GPU."""
