"""Imports without garbage collection, which is as it was afterwards; what they make is old then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from inference_shardformer.importing import collection_paused


@pytest.fixture(autouse=True)
def _collection_on() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_paused_inside_and_on_again_after() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_again_after_an_error() -> None:
    with pytest.raises(ImportError), collection_paused():
        raise ImportError
    assert gc.isenabled()


def test_stays_off_where_it_was_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


class _Ring:
    """A cycle, which reference counts never free."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_made_inside_is_old_and_can_still_be_collected() -> None:
    gc.collect()
    with collection_paused():
        ring = _Ring()
    assert not any(each is ring for each in gc.get_objects(generation=0))
    assert any(each is ring for each in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0
    gone = weakref.ref(ring)
    del ring
    gc.collect()
    assert gone() is None


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collection_paused():
            pass
        assert gc.get_freeze_count() > 0.9 * frozen  # some of it may have been freed since
    finally:
        gc.unfreeze()
