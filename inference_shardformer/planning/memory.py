"""What fits into the memory of a rank beside the weights: a step's activations, and blocks of the cache."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inference_shardformer.kv_cache.sizing import blocks_for
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.sharding.plan import ShardingPlan
from inference_shardformer.sharding.styles import padded_vocab_part

_SHORTEST_SHOWN = 1024


@dataclass(frozen=True)
class Workspace:
    """An estimate, from above, of what the activations of the largest step take.

    Counted are the residual stream and its norm, also in float32; all products of the widest layer at once, each with
    one more tensor of its size (a rotated, activated or added one); and the logits in their own type and in float32.
    What an attention backend or a library takes for itself is not.
    """

    num_tokens: int
    num_sequences: int
    bytes_per_token: int
    bytes_per_sequence: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a step of `num_tokens` tokens of which `num_sequences` are sampled."""
        return self.num_tokens * self.bytes_per_token + self.num_sequences * self.bytes_per_sequence


class Memory(NamedTuple):
    """Bytes that one rank may use, and where the number is from."""

    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Capacity:
    """What a rank's memory holds. `num_sequences` maps a context length to how many such sequences fit together."""

    memory: Memory
    cache_bytes: int  # left for the cache; negative is what is missing for weights and workspace
    num_blocks: int
    num_tokens: int
    max_model_len: int
    num_sequences: dict[int, int]

    @property
    def max_context(self) -> int:
        """The longest sequence that fits, alone, in tokens."""
        return min(self.num_tokens, self.max_model_len)


def plan_workspace(plan: ShardingPlan, dtype: torch.dtype, *, num_tokens: int, num_sequences: int) -> Workspace:
    """The workspace of steps of at most `num_tokens` tokens and `num_sequences` sequences."""
    widths: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by layer, then by module; experts are one module
    for module in plan.modules:
        numbers = [part for part in module.path.split(".") if part.isdigit()]
        if numbers:
            width = sum(each.num_elements // each.shape[-1] for each in module.parameters if len(each.shape) > 1)
            kind = ".".join(part for part in module.path.split(".") if not part.isdigit())
            widths[numbers[0]][kind] = max(width, widths[numbers[0]].get(kind, 0))
    widest = max((sum(layer.values()) for layer in widths.values()), default=0)
    hidden = plan.facts.hidden_size
    bytes_per_token = (2 * widest + 2 * hidden) * dtype.itemsize + hidden * torch.float32.itemsize
    logits = padded_vocab_part(plan.facts.vocab_size, plan.layout.tp_size)
    return Workspace(num_tokens, num_sequences, bytes_per_token, logits * (dtype.itemsize + torch.float32.itemsize))


def plan_capacity(
    spec: KVCacheSpec, memory: Memory, *, weight_bytes: int, workspace: Workspace, max_model_len: int
) -> Capacity:
    """What is left of `memory` for the cache, in blocks, tokens and sequences."""
    left = memory.num_bytes - weight_bytes - workspace.num_bytes
    num_blocks = max(0, left // spec.bytes_per_block)
    lengths = [max_model_len]
    while lengths[0] > _SHORTEST_SHOWN:
        lengths.insert(0, max(_SHORTEST_SHOWN, lengths[0] // 4))
    return Capacity(
        memory=memory,
        cache_bytes=left,
        num_blocks=num_blocks,
        num_tokens=num_blocks * spec.block_size,
        max_model_len=max_model_len,
        num_sequences={length: num_blocks // blocks_for(length, spec.block_size) for length in lengths},
    )
