"""An engine over a sharded model, and its paged cache: sized by the rank with the least memory, allocated on all."""

from __future__ import annotations

from typing import NamedTuple

from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.config.resolved import with_decision
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.sizing import free_memory, size_cache
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.modeling.packed_forward import forward_of
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.sharded import Sharded
from inference_shardformer.sharding.update import ShardWriter

_NUM_BLOCKS = "inference.cache.num_blocks"


class Attached(NamedTuple):
    """An engine, what exchanges its attention backend, and why its cache has as many blocks."""

    engine: InferenceEngine
    switch: BackendSwitch
    cache_reason: str


def attach_engine(prepared: Prepared, sharded: Sharded, ranks: Ranks, tokenizer: Tokenizer | None) -> Attached:
    """Allocate the cache and put an engine over the sharded model. Every rank calls this."""
    kv_cache, reason = ranks.guard.together("cache allocation", lambda: allocate_cache(prepared, ranks))
    config = with_decision(prepared.config, _NUM_BLOCKS, kv_cache.num_blocks, reason)
    switch = BackendSwitch(
        sharded.model,
        attention=prepared.attention,
        selections=prepared.selections,
        rank_verdicts=prepared.rank_verdicts,
        options=config.inference.attention.options,
    )
    engine = InferenceEngine(
        forward_of(sharded.model, prepared.policy.model_shape),
        facts=prepared.facts,
        config=config,
        attention=prepared.attention,
        kv_cache=kv_cache,
        group=ranks.group,
        guard=ranks.guard,
        vocab_range=sharded.plan.vocab_range,
        tokenizer=tokenizer,
        switch=switch,
        draw=prepared.kernels.sampling.bind(),
        greatest=prepared.kernels.sampling.bind_greatest(),
        weights=ShardWriter(sharded.model, sharded.plan, sharded.original, sharded.note_new_weights),
    )
    return Attached(engine, switch, reason)


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
