"""Importing large libraries faster."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection inside, unless it was off before: what an import makes stays, and would be walked again
    and again. About a quarter of the time that importing transformers takes.

    What was made inside counts as old afterwards, or the next allocation would walk all of it as if it were new.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            _make_old()
            gc.enable()


def _make_old() -> None:
    """Every object joins the oldest generation, without being walked; a full collection still frees it."""
    if gc.get_freeze_count() == 0:  # or what somebody else has frozen would thaw
        gc.freeze()
        gc.unfreeze()
