"""Case: sequences and the shape they run at; and the table of named batches that every backend serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference_shardformer.attention.base import AttentionSpec, Feature

Sequences = tuple[tuple[int, int], ...]  # (tokens already cached, tokens of this step), decodes first

RAGGED_DECODES: Sequences = tuple((past, 1) for past in (40, 3, 130, 17, 64, 0, 5, 41, 99, 12, 31, 300))
MIXED: Sequences = ((20, 1), (7, 1), (33, 1), (0, 19), (16, 9), (0, 2), (48, 16))


@dataclass(frozen=True)
class Case:
    """One batch at one shape, in one type."""

    sequences: Sequences
    dtype: torch.dtype = torch.float32
    num_kv_heads: int = 2
    gqa_ratio: int = 3
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_dtype: torch.dtype | None = None

    @property
    def features(self) -> frozenset[Feature]:
        """What this batch needs of a backend, beside what the shape implies."""
        chunked = any(past and new > 1 for past, new in self.sequences)
        mixed = len({new == 1 for _, new in self.sequences}) == 2
        found = {Feature.CHUNKED_PREFILL: chunked, Feature.MIXED_BATCH: mixed}
        return frozenset(feature for feature, needed in found.items() if needed)

    def spec(self, device: torch.device) -> AttentionSpec:
        """The case as facts for a backend; the scale is not the usual one, so that ignoring it shows."""
        return AttentionSpec(
            num_heads=self.num_kv_heads * self.gqa_ratio,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=1.24 * self.head_dim**-0.5,
            dtype=self.dtype,
            device=device,
            block_size=self.block_size,
            sliding_window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            kv_dtype=self.kv_dtype,
            features=self.features,
        )


def named_batches(block_size: int) -> dict[str, Sequences]:
    """The table. Lengths at the edges of blocks follow the block size."""
    size = block_size
    edges = [(past, 1) for past in (size - 2, size - 1, size, 2 * size - 1) if past >= 0]
    edges += [(0, new) for new in (size - 1, size, size + 1) if new > 1]
    edges += [(size, size), (size - 1, size + 1)] if size > 1 else [(1, 2), (2, 2)]
    return {
        "empty": (),
        "single_decode": ((37, 1),),
        "one_token_prompt": ((0, 1),),
        "equal_decodes": ((31, 1),) * 5,
        "ragged_decodes": RAGGED_DECODES,
        "single_prompt": ((0, 23),),
        "ragged_prompts": ((0, 5), (0, 33), (0, 16), (0, 2)),
        "chunked_prefill": ((8, 8), (21, 5), (64, 30)),
        "mixed": MIXED,
        "block_boundaries": tuple(edges),
        "long_decode": ((2600, 1), (30, 1)),
        "long_chunk": ((1100, 1), (1000, 33)),
    }
