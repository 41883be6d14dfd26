"""Requests, scheduling, the step and sampling."""
