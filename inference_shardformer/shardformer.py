"""InferenceShardformer: from two typed configurations to a sharded model, and on to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.origins import Origin
from inference_shardformer.config.provenance import call_provenance
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.errors import StateError
from inference_shardformer.explanation import explain
from inference_shardformer.huggingface import architecture_of, eos_token_ids, load_hf_config, locate_checkpoint
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.sizing import free_memory, size_cache
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.preparation import Asked, Prepared, agreed_facts, prepare
from inference_shardformer.ranks import Ranks
from inference_shardformer.sharded import Sharded, shard_checkpoint, shard_model

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
    from inference_shardformer.policies.base import Policy
    from inference_shardformer.sharding.weights import Progress


class State(Enum):
    """Where a shardformer stands; each state names the calls that are legal in it."""

    CREATED = "created"
    SHARDED = "sharded"
    ATTACHED = "attached"
    CLOSED = "closed"
    FAILED = "failed"


_LEGAL = {
    State.CREATED: "optimize(), from_pretrained(), close()",
    State.SHARDED: "attach(), explain(), close()",
    State.ATTACHED: "explain(), close()",
    State.CLOSED: "none",
    State.FAILED: "close()",
}


class InferenceShardformer:
    """Shards one Hugging Face decoder over the ranks of a process group and hands it to an engine.

    Every rank makes the same calls. The ranks are those of `process_group` (a group or sub-group the caller made), else
    of the default group, else of the `torchrun` environment, else this process alone. Backend, sizes and values are
    decided and checked, on all ranks alike, before any weight is read.
    """

    def __init__(
        self,
        shard_config: ShardConfig | None = None,
        inference_config: InferenceConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        provenance: Mapping[str, Origin] | None = None,
    ) -> None:
        shard, inference = shard_config or ShardConfig(), inference_config or InferenceConfig()
        origins = call_provenance(shard, inference) if provenance is None else provenance
        self._asked = Asked(shard, inference, dict(origins))
        self._process_group = process_group
        self._ranks: Ranks | None = None
        self._prepared: Prepared | None = None
        self._sharded: Sharded | None = None
        self._engine: InferenceEngine | None = None
        self._cache_reason = ""
        self._state = State.CREATED

    @property
    def state(self) -> State:
        """Where this shardformer stands."""
        return self._state

    @property
    def group(self) -> TensorParallelGroup:
        """The tensor-parallel group; known once a model is sharded."""
        if self._ranks is None:
            raise self._illegal("group")
        return self._ranks.group

    @property
    def sharded(self) -> Sharded:
        """The sharded model with its plan; known once a model is sharded."""
        if self._sharded is None:
            raise self._illegal("sharded")
        return self._sharded

    def from_pretrained(
        self, path_or_hub_id: str | Path, *, policy: Policy | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        """Build the model from a checkpoint of which this rank reads its own slices only.

        `progress` is called with the bytes done and the bytes in all on this rank. Raises `CheckpointError`,
        `UnsupportedModelError`, `TensorParallelSizeError`, `ConfigError` or `BackendUnavailableError`, the same on
        every rank.
        """
        ranks = self._begin("from_pretrained()")
        try:
            prepared, folder = ranks.guard.together("preparation", lambda: self._prepare_folder(path_or_hub_id, policy))
            ranks.guard.agree("preparation", agreed_facts(prepared))
            sharded = ranks.guard.together(
                "weight loading", lambda: shard_checkpoint(prepared, ranks, folder, progress)
            )
        except BaseException:
            self._state = State.FAILED
            raise
        return self._finish(prepared, sharded)

    def optimize(
        self, model: PreTrainedModel, policy: Policy | None = None
    ) -> tuple[PreTrainedModel, list[tuple[str, str]]]:
        """Shard a Hugging Face model in memory, in place; returns it and the pairs of parameters that are one tensor.

        Every rank holds the same whole model; the parts that this rank does not need are let go one by one.
        """
        ranks = self._begin("optimize()")
        try:
            eos = eos_token_ids(model, model.config)
            prepared = ranks.guard.together(
                "preparation", lambda: prepare(self._asked, ranks, model.config, type(model).__name__, eos, policy)
            )
            ranks.guard.agree("preparation", agreed_facts(prepared))
            sharded = ranks.guard.together("sharding", lambda: shard_model(prepared, ranks, model))
        except BaseException:
            self._state = State.FAILED
            raise
        return self._finish(prepared, sharded), list(sharded.plan.shared_parameters)

    def attach(self, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None) -> InferenceEngine:
        """Size and allocate the paged cache and put an engine over the model that this shardformer sharded."""
        if self._state is not State.SHARDED or self._sharded is None or self._prepared is None or self._ranks is None:
            raise self._illegal("attach()")
        if model is not self._sharded.model:
            raise StateError(
                f"attach() was given another {type(model).__name__} than the one this shardformer sharded",
                remedy="attach the model that optimize() or from_pretrained() returned",
            )
        ranks, prepared = self._ranks, self._prepared
        kv_cache = ranks.guard.together("cache allocation", lambda: self._allocate_cache(prepared, ranks))
        self._engine = InferenceEngine(
            model,
            facts=prepared.facts,
            config=prepared.config,
            backend=prepared.backend,
            kv_cache=kv_cache,
            group=ranks.group,
            guard=ranks.guard,
            vocab_range=self._sharded.plan.vocab_range,
            tokenizer=tokenizer,
        )
        self._state = State.ATTACHED
        return self._engine

    def explain(self) -> str:
        """Every value with its source and reason, every backend candidate with its verdict, as text for people."""
        if self._prepared is None or self._sharded is None or self._ranks is None:
            raise self._illegal("explain()")
        return explain(self._prepared, self._sharded, self._cache_reason)

    def close(self) -> None:
        """Close the engine, the guard and the groups this shardformer made. Idempotent."""
        if self._state is State.CLOSED:
            return
        self._state = State.CLOSED
        if self._engine is not None:
            self._engine.close()
        if self._ranks is not None:
            self._ranks.close()
        self._engine = self._sharded = self._prepared = self._ranks = None

    def __enter__(self) -> InferenceShardformer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin(self, call: str) -> Ranks:
        if self._state is not State.CREATED:
            raise self._illegal(call)
        try:
            self._ranks = Ranks.join(self._asked.shard, self._process_group)
        except BaseException:
            self._state = State.FAILED
            raise
        return self._ranks

    def _prepare_folder(self, path_or_hub_id: str | Path, policy: Policy | None) -> tuple[Prepared, Path]:
        folder = locate_checkpoint(path_or_hub_id)
        trust = self._asked.inference.weights.trust_remote_code
        hf_config = load_hf_config(folder, trust_remote_code=trust)
        architecture, eos = architecture_of(hf_config), eos_token_ids(folder, hf_config)
        return prepare(self._asked, self._ranks_or_raise(), hf_config, architecture, eos, policy), folder

    def _ranks_or_raise(self) -> Ranks:
        if self._ranks is None:
            raise self._illegal("this call")
        return self._ranks

    def _finish(self, prepared: Prepared, sharded: Sharded) -> PreTrainedModel:
        self._prepared, self._sharded, self._state = prepared, sharded, State.SHARDED
        return sharded.model

    def _allocate_cache(self, prepared: Prepared, ranks: Ranks) -> PagedKVCache:
        config, facts, spec = prepared.config, prepared.facts, prepared.backend.spec
        kv_spec = KVCacheSpec(facts.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype)
        num_blocks, self._cache_reason = size_cache(
            kv_spec,
            config.inference.cache,
            max_num_seqs=config.inference.scheduler.max_num_seqs,
            max_model_len=config.max_model_len,
            free_bytes=free_memory(ranks.device),
            ranks_on_host=ranks.ranks_on_host,
        )
        agreed = min(int(text) for text in ranks.group.all_gather_bytes(str(num_blocks).encode()))
        return PagedKVCache(kv_spec, num_blocks=agreed, device=ranks.device)

    def _illegal(self, call: str) -> StateError:
        return StateError(
            f"{call} is not possible in the state {self._state.value!r}",
            remedy=f"legal now: {_LEGAL[self._state]}; a shardformer shards one model, make another for the next",
        )
