"""The backend section of an explanation: which layers, on which ranks, are served by what, and every verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference_shardformer.attention.groups import layer_ranges
from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.verdicts import LayerVerdicts
from inference_shardformer.explaining.kernels import candidates_object, told
from inference_shardformer.explaining.text import INDENT


@dataclass(frozen=True)
class BackendGroup:
    """Layers that share a spec, and the ranks on which they have the same spec and the same verdicts."""

    ranks: tuple[int, ...]
    found: LayerVerdicts

    @property
    def selection(self) -> Selection:
        """The chosen backend, and a verdict on every candidate."""
        return self.found.selection

    def to_json(self) -> dict[str, object]:
        """A stable object for programs."""
        return {
            "layers": list(self.found.layers),
            "ranks": list(self.ranks),
            "spec": dict(self.found.spec),
            "chosen": self.selection.name,
            "reason": self.selection.reason,
            "candidates": candidates_object(self.selection),
        }

    def rows(self) -> list[tuple[str, str]]:
        """What is served, and below it every candidate with its verdict."""
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {layer_ranges(self.ranks)}"
        layers = f"layer{'s' if len(self.found.layers) > 1 else ''} {layer_ranges(self.found.layers)}"
        return [
            (f"{layers} on {ranks}", self.found.needs),
            *((f"{INDENT}{verdict.name}", told(verdict, self.selection)) for verdict in self.selection.verdicts),
        ]


def merge_ranks(rank_verdicts: Sequence[Sequence[LayerVerdicts]]) -> tuple[BackendGroup, ...]:
    """The groups of all ranks; those that say the same become one. Ordered by layers, then by ranks."""
    merged: list[tuple[list[int], LayerVerdicts]] = []
    for rank, verdicts in enumerate(rank_verdicts):
        for found in verdicts:
            ranks = next((ranks for ranks, known in merged if known == found), None)
            if ranks is None:
                merged.append(([rank], found))
            else:
                ranks.append(rank)
    groups = [BackendGroup(tuple(ranks), found) for ranks, found in merged]
    return tuple(sorted(groups, key=lambda group: (group.found.layers[0], group.ranks)))
