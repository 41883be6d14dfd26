"""Tuning: backends are measured on the present hardware, and a profile keeps the choice; reuse checks it."""
