"""LayerGroups: the layers of a model by what their attention needs; equal needs are served by one backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from inference_shardformer.attention.spec import AttentionSpec
from inference_shardformer.errors import PolicyError


@dataclass(frozen=True)
class LayerGroups:
    """The distinct specs of a model on one rank, in the order of their first layers, and the group of each layer."""

    specs: tuple[AttentionSpec, ...]
    group_of: tuple[int, ...]  # [num_layers], a place in `specs`

    @classmethod
    def of(cls, per_layer: Iterable[AttentionSpec]) -> LayerGroups:
        """Group the specs of layers 0, 1, 2...

        Raises `PolicyError` if there is no layer, or if layers differ in what one paged cache must hold.
        """
        places: dict[AttentionSpec, int] = {}
        group_of = tuple(places.setdefault(spec, len(places)) for spec in per_layer)
        groups = cls(tuple(places), group_of)
        groups._check_cache()
        return groups

    def stored_in(self, kv_dtype: torch.dtype | None) -> LayerGroups:
        """The same groups with keys and values in another type; `None`: as the policy says."""
        if kv_dtype is None:
            return self
        return replace(self, specs=tuple(replace(spec, kv_dtype=kv_dtype) for spec in self.specs))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.group_of)

    def layers(self, group: int) -> tuple[int, ...]:
        """The layers of one group, in order."""
        return tuple(layer_idx for layer_idx, own in enumerate(self.group_of) if own == group)

    def named(self, group: int) -> str:
        """The layers of one group in a few words."""
        layers = self.layers(group)
        return f"layer{'s' if len(layers) > 1 else ''} {layer_ranges(layers)}"

    def _asking(self, group: int) -> str:
        return f"{self.named(group)} {'ask' if len(self.layers(group)) > 1 else 'asks'}"

    def _check_cache(self) -> None:
        if not self.specs:
            raise PolicyError("the model has no attention layer", remedy="let the policy's facts count its layers")
        for group, spec in enumerate(self.specs):
            kept, first = _kept(spec), _kept(self.specs[0])
            differing = [f"{name} {kept[name]} instead of {first[name]}" for name in kept if kept[name] != first[name]]
            if differing:
                raise PolicyError(
                    f"{self._asking(group)} the cache for {', '.join(differing)} as in {self.named(0)}; one paged "
                    "cache holds keys and values of one shape and type",
                    remedy="give every layer the same key/value heads, head_dim, block size and type in the policy's "
                    "attention_spec()",
                )


def layer_ranges(layers: Sequence[int]) -> str:
    """Layers as text: `0-29`, `0,2,...,40` for five or more at equal distance, `0-4,6-10` for several runs."""
    strides = {second - first for first, second in pairwise(layers)}
    if len(layers) > 4 and len(strides) == 1 and min(strides) > 1:
        return f"{layers[0]},{layers[1]},...,{layers[-1]}"
    runs: list[list[int]] = []
    for layer_idx in layers:
        if runs and layer_idx == runs[-1][-1] + 1:
            runs[-1].append(layer_idx)
        else:
            runs.append([layer_idx])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _kept(spec: AttentionSpec) -> dict[str, object]:
    """What the cache must hold for a spec."""
    return {
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "block_size": spec.block_size,
        "type": str(spec.cache_dtype).removeprefix("torch."),
    }
