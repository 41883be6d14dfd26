"""InferenceShardformer: from two typed configurations to a sharded model, and on to an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer import reversing
from inference_shardformer.attaching import attach_engine
from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.loader import gather, merge_layers
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.errors import EnvironmentMismatchError, StateError
from inference_shardformer.explaining.explanation import Explanation, explain_engine
from inference_shardformer.huggingface import locate_checkpoint, model_in_memory, read_model
from inference_shardformer.planning.agreed import agreed_plan
from inference_shardformer.preparing import prepare_together
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.examination import ModelSource, refuse
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.saving import SavesWeights
from inference_shardformer.sharded import Sharded, shard_checkpoint, shard_rank_files
from inference_shardformer.sharding.sharder import ModulePlacer, place_planned
from inference_shardformer.states import State, illegal

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
    from inference_shardformer.policies.base import Policy
    from inference_shardformer.sharding.plan_file import PlanFile
    from inference_shardformer.sharding.weights import Progress


class InferenceShardformer(SavesWeights):
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
        self,
        path_or_hub_id: str | Path,
        *,
        policy: Policy | None = None,
        plan: str | Path | PlanFile | None = None,
        progress: Progress | None = None,
    ) -> PreTrainedModel:
        """Build the model from a checkpoint of which this rank reads its own slices only.

        With a `plan` the slices are those of that file, which `inference-shardformer plan --out` writes; one that does
        not fit the model and the ranks is refused with `PlanFileError`.
        `progress` is called with the bytes done and the bytes in all on this rank. Raises `CheckpointError`,
        `UnsupportedModelError`, `TensorParallelSizeError`, `ConfigError` or `BackendUnavailableError`, the same on
        every rank.
        """
        trust = self._early.inference.weights.trust_remote_code
        read = partial(read_model, path_or_hub_id, policy, trust_remote_code=trust)
        ranks = self._begin("from_pretrained()", read)
        try:
            prepared = prepare_together(self._layers, ranks, read)
            file = None if plan is None else agreed_plan(ranks.guard, plan)
            sharded = ranks.guard.together(
                "weight loading",
                lambda: shard_checkpoint(prepared, ranks, locate_checkpoint(path_or_hub_id), progress, file),
            )
        except BaseException:
            self._state = State.FAILED
            raise
        return self._finish(prepared, sharded)

    def optimize(
        self, model: PreTrainedModel, policy: Policy | None = None
    ) -> tuple[PreTrainedModel, list[tuple[str, str]]]:
        """Shard a Hugging Face model in memory, in place; returns it and the pairs of parameters that are one tensor.

        Every rank holds the same whole model; the parts that this rank does not need are let go one by one. If that
        ends half way and all ranks are alive, the model is restored.
        """
        sharded = self._optimize(model, policy, must_be_reversible=False)
        return sharded.model, list(sharded.plan.shared_parameters)

    @contextmanager
    def sharded_model(self, model: PreTrainedModel, policy: Policy | None = None) -> Iterator[PreTrainedModel]:
        """`optimize(model, policy)` for the length of a `with`, and `unshard(model)` at its end, whatever happened.

        Raises `StateError`, before anything is changed, where the model could not become again what it is.
        """
        self._optimize(model, policy, must_be_reversible=True)
        try:
            yield model
        finally:
            if self._state in (State.SHARDED, State.ATTACHED):
                self.unshard(model)

    def load_sharded(
        self, folder: str | Path, *, policy: Policy | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        """Build the model from what `save_sharded` wrote; every rank reads its own file.

        Raises `PlanFileError` where it was saved by other ranks, another model or another policy.
        """
        trust = self._early.inference.weights.trust_remote_code
        read = partial(read_model, folder, policy, trust_remote_code=trust)
        ranks = self._begin("load_sharded()", read)
        try:
            prepared = prepare_together(self._layers, ranks, read)
            sharded = ranks.guard.together(
                "weight loading", lambda: shard_rank_files(prepared, ranks, Path(folder), progress)
            )
        except BaseException:
            self._state = State.FAILED
            raise
        self._finish(prepared, sharded)
        return sharded.model

    def unshard(self, model: PreTrainedModel, *, everywhere: bool = True) -> PreTrainedModel:
        """Make the model the unsharded Hugging Face model again, in place: classes, values, ties, hooks, configuration.

        Closes the engine. One parameter after another is gathered; unless `everywhere`, rank 0 alone gets them, and
        those of other ranks are left on the meta device. Raises `StateError` where the original values are gone, and
        `CheckpointError` if copies of one tensor differ between ranks.
        """
        prepared, sharded, ranks = self._held("unshard()", model)
        reversing.check(prepared, sharded)
        if self._engine is not None:
            self._engine.close()
        self._state = State.FAILED  # until every rank is done
        self._engine = self._sharded = self._switch = None
        ranks.guard.together("unsharding", lambda: reversing.unshard(prepared, sharded, ranks, everywhere=everywhere))
        self._state = State.RESTORED
        return model

    def _optimize(self, model: PreTrainedModel, policy: Policy | None, *, must_be_reversible: bool) -> Sharded:
        source = model_in_memory(model, policy)
        ranks = self._begin("optimize()", lambda: source)
        try:
            prepared = prepare_together(self._layers, ranks, lambda: source)
            sharded = reversing.shard(
                prepared, ranks, model, must_be_reversible=must_be_reversible, place=self._module_placer()
            )
        except BaseException:
            self._state = State.FAILED
            raise
        self._finish(prepared, sharded)
        return sharded

    def attach(self, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None) -> InferenceEngine:
        """Size and allocate the paged cache and put an engine over the model that this shardformer sharded."""
        if self._state is not State.SHARDED:
            raise self._illegal("attach()")
        prepared, sharded, ranks = self._held("attach()", model)
        self._engine, self._switch, self._cache_reason = attach_engine(prepared, sharded, ranks, tokenizer)
        self._state = State.ATTACHED
        return self._engine

    def explain(self) -> Explanation:
        """Every value with its origin, its reason and what it beat, every rank's shard, every backend's verdict.

        As text for people it is `str()` of what is returned, for programs its `to_json()`.
        """
        prepared, sharded, _ = self._held("explain()")
        now = prepared.config if self._engine is None else self._engine.config.current.config
        verdicts = prepared.rank_verdicts if self._switch is None else self._switch.rank_verdicts
        prepared = replace(prepared, rank_verdicts=verdicts)
        return explain_engine(prepared, sharded, now, cache_reason=self._cache_reason)

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

    def _module_placer(self) -> ModulePlacer:
        """What puts the planned modules into a model in memory."""
        return place_planned

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

    def _finish(self, prepared: Prepared, sharded: Sharded) -> PreTrainedModel:
        self._prepared, self._sharded, self._state = prepared, sharded, State.SHARDED
        return sharded.model

    def _held(self, call: str, model: PreTrainedModel | None = None) -> tuple[Prepared, Sharded, Ranks]:
        """What a sharded model hangs on. Raises `StateError` without one, and for another model than that."""
        if self._prepared is None or self._sharded is None or self._ranks is None:
            raise self._illegal(call)
        if model is not None and model is not self._sharded.model:
            raise StateError(
                f"{call} was given another {type(model).__name__} than the one this shardformer sharded",
                remedy="give it the model that optimize() or from_pretrained() returned",
            )
        return self._prepared, self._sharded, self._ranks

    def _illegal(self, call: str) -> StateError:
        return illegal(call, self._state)
