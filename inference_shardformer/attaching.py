"""The paged cache of an engine: sized by the rank with the least memory, allocated on all."""

from __future__ import annotations

from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.sizing import free_memory, size_cache
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.preparation import Prepared


def allocate_cache(prepared: Prepared, ranks: Ranks) -> tuple[PagedKVCache, str]:
    """The cache of this rank, and why it has as many blocks. Every rank calls this. Raises `CapacityError`."""
    config, facts, spec = prepared.config, prepared.facts, prepared.attention.groups.specs[0]
    kv_spec = KVCacheSpec(facts.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.cache_dtype)
    num_blocks, reason = size_cache(
        kv_spec,
        config.inference.cache,
        max_num_seqs=config.inference.scheduler.max_num_seqs,
        max_model_len=config.max_model_len,
        free_bytes=free_memory(ranks.device),
        ranks_on_host=ranks.ranks_on_host,
    )
    agreed = min(int(text) for text in ranks.group.all_gather_bytes(str(num_blocks).encode()))
    layouts = prepared.attention.kv_layouts
    return PagedKVCache(kv_spec, num_blocks=agreed, device=ranks.device, layout=layouts), reason
