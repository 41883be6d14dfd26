"""Which backends only store keys and values at their slots in `write`, so that a fused kernel may do it for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Write = TypeVar("Write", bound=Callable[..., None])

_MARK = "_stores_by_slot"


def stores_by_slot(write: Write) -> Write:
    """Marks a `write` that puts each token's key and value at its slot of the declared layout, and does nothing else.

    The mark belongs to the function: a subclass that writes in a way of its own has lost it, unless it says it again.
    """
    setattr(write, _MARK, True)
    return write


def is_stored_by_slot(backend: object) -> bool:
    """Whether the `write` of a backend, or of a class of backends, is marked so."""
    return bool(getattr(getattr(backend, "write", None), _MARK, False))
