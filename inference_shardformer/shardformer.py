"""InferenceShardformer: from two typed configurations to a sharded model, and on to an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.loader import gather, merge_layers
from inference_shardformer.config.resolved import with_decision
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.errors import ConfigError, EnvironmentMismatchError, StateError
from inference_shardformer.explaining.explanation import Explanation, explain_engine
from inference_shardformer.huggingface import eos_token_ids, locate_checkpoint, read_model
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.sizing import free_memory, size_cache
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.examination import ModelSource, refuse
from inference_shardformer.resolving.preparation import Prepared, agreed_facts, prepare
from inference_shardformer.sharded import Sharded, shard_checkpoint, shard_model

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
    from inference_shardformer.policies.base import Policy
    from inference_shardformer.sharding.weights import Progress


T = TypeVar("T")

_NUM_BLOCKS = "inference.cache.num_blocks"


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

    What was given to the two configurations beats everything that `sources` say: files, the environment, options of a
    command line. Without `sources` the environment is read alone; `ConfigSources(environ={})` reads nothing. Whatever
    is wrong with any of it is raised, all at once, by `from_pretrained` or `optimize`.
    """

    def __init__(
        self,
        shard_config: ShardConfig | None = None,
        inference_config: InferenceConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        sources: ConfigSources | None = None,
    ) -> None:
        self._layers = gather(sources, shard_config, inference_config)
        self._early = merge_layers(self._layers)  # without the preset, which nothing that is needed early comes from
        self._process_group = process_group
        self._ranks: Ranks | None = None
        self._prepared: Prepared | None = None
        self._sharded: Sharded | None = None
        self._engine: InferenceEngine | None = None
        self._switch: BackendSwitch | None = None
        self._cache_reason = ""
        self._state = State.CREATED

    @property
    def state(self) -> State:
        """Where this shardformer stands."""
        return self._state

    @property
    def events(self) -> tuple[ConfigEvent, ...]:
        """What `inference.strict=false` let pass; empty until a model is prepared, and wherever strict is on."""
        return () if self._prepared is None else self._prepared.events

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
        trust = self._early.inference.weights.trust_remote_code
        read = partial(read_model, path_or_hub_id, policy, trust_remote_code=trust)
        ranks = self._begin("from_pretrained()", read)
        try:
            prepared = self._prepare(ranks, read)
            sharded = ranks.guard.together(
                "weight loading",
                lambda: shard_checkpoint(prepared, ranks, locate_checkpoint(path_or_hub_id), progress),
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
        source = ModelSource(model.config, type(model).__name__, eos_token_ids(model, model.config), policy)
        ranks = self._begin("optimize()", lambda: source)
        try:
            prepared = self._prepare(ranks, lambda: source)
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
        config = with_decision(prepared.config, _NUM_BLOCKS, kv_cache.num_blocks, self._cache_reason)
        self._switch = BackendSwitch(
            model,
            backend=prepared.backend,
            selection=prepared.selection,
            num_layers=prepared.facts.num_layers,
            options=config.inference.attention.options,
        )
        self._engine = InferenceEngine(
            model,
            facts=prepared.facts,
            config=config,
            backend=prepared.backend,
            kv_cache=kv_cache,
            group=ranks.group,
            guard=ranks.guard,
            vocab_range=self._sharded.plan.vocab_range,
            tokenizer=tokenizer,
            switch=self._switch,
        )
        self._state = State.ATTACHED
        return self._engine

    def explain(self) -> Explanation:
        """Every value with its origin, its reason and what it beat, every rank's shard, every backend's verdict.

        As text for people it is `str()` of what is returned, for programs its `to_json()`.
        """
        if self._prepared is None or self._sharded is None or self._ranks is None:
            raise self._illegal("explain()")
        now = self._prepared.config if self._engine is None else self._engine.config.current.config
        selection = self._prepared.selection if self._switch is None else self._switch.selection
        prepared = replace(self._prepared, selection=selection)
        return explain_engine(prepared, self._sharded, now, cache_reason=self._cache_reason)

    def close(self) -> None:
        """Close the engine, the guard and the groups this shardformer made. Idempotent."""
        if self._state is State.CLOSED:
            return
        self._state = State.CLOSED
        if self._engine is not None:
            self._engine.close()
        if self._ranks is not None:
            self._ranks.close()
        self._engine = self._sharded = self._prepared = self._ranks = self._switch = None

    def __enter__(self) -> InferenceShardformer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin(self, call: str, read: Callable[[], ModelSource]) -> Ranks:
        if self._state is not State.CREATED:
            raise self._illegal(call)
        self._state = State.FAILED  # until the ranks are joined
        try:
            self._ranks = Ranks.join(self._early.shard, self._process_group)
        except EnvironmentMismatchError as exc:
            refuse(self._layers, read, exc)
        self._state = State.CREATED
        return self._ranks

    def _prepare(self, ranks: Ranks, read: Callable[[], ModelSource]) -> Prepared:
        """Decide and check everything, on all ranks alike."""
        prepared = _all_or_none(ranks, "preparation", lambda: prepare(self._layers, ranks, read))
        ranks.guard.agree("preparation", agreed_facts(prepared))
        if torch.get_num_threads() != prepared.config.threads_per_rank:
            torch.set_num_threads(prepared.config.threads_per_rank)
        return prepared

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
        return PagedKVCache(
            kv_spec, num_blocks=agreed, device=ranks.device, layout=prepared.backend.capabilities.kv_layout
        )

    def _illegal(self, call: str) -> StateError:
        return StateError(
            f"{call} is not possible in the state {self._state.value!r}",
            remedy=f"legal now: {_LEGAL[self._state]}; a shardformer shards one model, make another for the next",
        )


def _all_or_none(ranks: Ranks, phase: str, fn: Callable[[], T]) -> T:
    """`guard.together`; ranks whose configuration is wrong in the same way keep their list of violations."""
    try:
        return ranks.guard.together(phase, fn)
    except ConfigError as exc:
        mine = exc.__cause__
        if isinstance(mine, ConfigViolations) and mine.message.startswith(exc.message):
            raise mine from None
        raise
