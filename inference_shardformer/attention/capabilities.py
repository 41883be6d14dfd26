"""AttentionCapabilities: the facts a backend declares about itself, from which every refusal is derived."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from inference_shardformer.attention.sizes import ANY_SIZE, Sizes
from inference_shardformer.kv_cache.layout import KVLayout

__all__ = ["AttentionCapabilities", "Feature", "KVLayout"]


class Feature(Enum):
    """What some backends can do and others cannot. A spec that needs a feature is served only where it is declared."""

    CHUNKED_PREFILL = "chunked_prefill"  # several query tokens of a sequence that has past tokens in the cache
    MIXED_BATCH = "mixed_batch"  # decoding and prefilling sequences in one batch
    SLIDING_WINDOW = "sliding_window"  # a query sees the latest `sliding_window` tokens only
    SOFTCAP = "softcap"  # scores are squashed to softcap * tanh(score / softcap)
    SINKS = "sinks"  # one more logit per head in the softmax's denominator; served by `attend_with_sinks`
    GRAPHS = "graphs"  # decode steps can be captured and replayed; served by `plan_capture` and `replan`


@dataclass(frozen=True, kw_only=True)
class AttentionCapabilities:
    """What a backend serves. Each fact stands alone: every combination of declared values must work.

    What the facts cannot express (a head dimension that needs a certain type, say) is said by `extra_reasons`. A new
    fact gets a default that means what was true before, so older declarations stay valid.
    """

    devices: tuple[str, ...]  # types of torch.device, "cpu"
    dtypes: tuple[torch.dtype, ...]  # of queries and outputs
    kv_dtypes: tuple[torch.dtype, ...] = ()  # that keys and values may be stored in, beside the type of the queries
    head_dims: Sizes = ANY_SIZE
    block_sizes: Sizes = ANY_SIZE
    gqa_ratios: Sizes = ANY_SIZE  # query heads per key head
    features: frozenset[Feature] = frozenset()
    kv_layout: KVLayout = KVLayout.NHD
    needs_native: bool = False  # the library of native CPU kernels
