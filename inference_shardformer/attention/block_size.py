"""What `cache.block_size=auto` means: the usual size, or that which the preferred backend needs."""

from __future__ import annotations

from collections.abc import Callable

from inference_shardformer.attention.groups import LayerGroups
from inference_shardformer.attention.selector import judge
from inference_shardformer.attention.sizes import Sizes
from inference_shardformer.attention.survey import Survey
from inference_shardformer.config.inference import TUNED

USUAL_BLOCK_SIZE = 16  # tokens; small blocks waste little memory at the end of a sequence


def choose_block_size(requested: str, groups_of: Callable[[int], LayerGroups], survey: Survey) -> int:
    """The block size at which the first candidate, or the one that was `requested`, serves all layers.

    `groups_of` gives what the layers need at a block size. The usual size where a candidate serves it, else the
    smallest that it serves; the usual one, too, if nothing can serve: then selection says why. A function of its
    arguments alone.
    """
    groups = groups_of(USUAL_BLOCK_SIZE)
    backends = {candidate.name: candidate.backend for candidate in survey.candidates}
    names = [verdict.name for verdict in judge(groups.specs[0], survey)]  # in order of preference
    for name in names if requested in ("auto", TUNED) else [requested]:
        backend = backends.get(name)
        if backend is None:
            continue
        size = _preferred(backend.capabilities.block_sizes)
        at_size = groups if size == USUAL_BLOCK_SIZE else groups_of(size)
        if all(_serves(name, at_size, group, survey) for group in range(len(at_size.specs))):
            return size
    return USUAL_BLOCK_SIZE


def _preferred(sizes: Sizes) -> int:
    return USUAL_BLOCK_SIZE if USUAL_BLOCK_SIZE in sizes else sizes.smallest


def _serves(name: str, groups: LayerGroups, group: int, survey: Survey) -> bool:
    return any(verdict.name == name and not verdict.reasons for verdict in judge(groups.specs[group], survey))
