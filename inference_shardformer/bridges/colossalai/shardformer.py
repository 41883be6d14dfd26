"""ColossalInferenceShardformer: our wrapper as a real ShardFormer of ColossalAI's, over its own ModelSharder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from inference_shardformer.bridges.colossalai.mending import mended_cpu_accelerator
from inference_shardformer.bridges.colossalai.placing import Placement
from inference_shardformer.bridges.colossalai.policies import PlacesNoPadding, check_coverage, policy_of
from inference_shardformer.bridges.colossalai.shard_config import colossal_config, read_shard_config
from inference_shardformer.bridges.colossalai.upstream import CpuAccelerator, ModelSharder, Policy, ShardFormer
from inference_shardformer.bridges.colossalai.upstream import ShardConfig as ColossalShardConfig
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import InferenceShardformerError, PolicyError, StateError
from inference_shardformer.huggingface import model_in_memory
from inference_shardformer.policies.base import Policy as CorePolicy
from inference_shardformer.shardformer import InferenceShardformer
from inference_shardformer.sharding.plan import ShardingPlan
from inference_shardformer.sharding.sharder import ModuleBuilder, ModulePlacer
from inference_shardformer.sharding.snapshot import ModelSnapshot
from inference_shardformer.states import State

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel

    from inference_shardformer.ranks import Ranks
    from inference_shardformer.resolving.preparation import Prepared
    from inference_shardformer.sharded import Sharded
    from inference_shardformer.sharding.plan_file import PlanFile
    from inference_shardformer.sharding.weights import Progress

_WHOLE = frozenset({"unshard()", "save_pretrained()", "save_sharded()"})  # calls that need all weights to be the plan's

SharedParams = list[dict[int, torch.Tensor]]
"""As ColossalAI gives them: parameters that several pipeline stages share. There are none without pipeline stages."""


class ColossalInferenceShardformer(InferenceShardformer, ShardFormer):
    """An `InferenceShardformer` that is a `colossalai.shardformer.ShardFormer`, and places its modules as one does.

    `shard_config` is ColossalAI's or ours; of ColossalAI's, whatever asks for something that is not offered is refused
    by name. The configuration, the choice of backends and kernels, and the engine are those of `InferenceShardformer`.
    """

    def __init__(
        self,
        shard_config: ColossalShardConfig | ShardConfig | None = None,
        inference_config: InferenceConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        sources: ConfigSources | None = None,
    ) -> None:
        settings = read_shard_config(shard_config, process_group)
        InferenceShardformer.__init__(
            self, settings.ours, inference_config, process_group=settings.process_group, sources=sources
        )
        ShardFormer.__init__(self, settings.theirs)
        self._policy: PlacesNoPadding | None = None
        self._alone: str = ""  # the policy that sharded the model without us
        self._foreign: list[nn.Module] = []
        self._shared: SharedParams = []

    def optimize(  # type: ignore[override]  # the second value is ColossalAI's
        self, model: PreTrainedModel, policy: Policy | CorePolicy | None = None
    ) -> tuple[PreTrainedModel, SharedParams]:
        """Shard a model in memory, in place, with ColossalAI's ModelSharder.

        Without a policy, with one of ours or with one that derives from `InferencePolicy`, everything is decided and
        proven first, and the result attaches to the engine. Any other policy of ColossalAI's runs unchanged, alone: the
        model is then what that policy makes of it, and has no engine. Raises `PolicyError` where a policy fails or
        would be skipped in part; the model then has the modules that it had.
        """
        if isinstance(policy, Policy) and not isinstance(policy, PlacesNoPadding):
            return model, self._run_alone(model, policy)
        self._optimize(model, policy, must_be_reversible=False)
        return model, self._shared

    def from_pretrained(
        self,
        path_or_hub_id: str | Path,
        *,
        policy: PlacesNoPadding | CorePolicy | None = None,
        plan: str | Path | PlanFile | None = None,
        progress: Progress | None = None,
    ) -> PreTrainedModel:
        """As `InferenceShardformer.from_pretrained`: every rank reads its own slices; ModelSharder has no part in it.

        A policy of the bridge stands for the one that it plans with. Raises `PolicyError` if it has descriptions of its
        own, whose modules would be made of native ones without weights.
        """
        if isinstance(policy, PlacesNoPadding):
            if type(policy).module_policy is not PlacesNoPadding.module_policy:
                raise PolicyError(
                    f"{type(policy).__name__} makes modules of its own, out of native ones that have their weights",
                    remedy="use optimize(AutoModelForCausalLM.from_pretrained(path), policy)",
                )
            policy = policy.core
        return super().from_pretrained(path_or_hub_id, policy=policy, plan=plan, progress=progress)

    def _optimize(
        self, model: PreTrainedModel, policy: PlacesNoPadding | CorePolicy | None, *, must_be_reversible: bool
    ) -> Sharded:
        self._policy = policy if isinstance(policy, PlacesNoPadding) else policy_of(model, policy)
        return super()._optimize(model, self._policy.core, must_be_reversible=must_be_reversible)

    def _module_placer(self) -> ModulePlacer:
        return self._place

    def _place(self, model: nn.Module, plan: ShardingPlan, builder: ModuleBuilder) -> frozenset[str]:
        """Let ModelSharder put the plan's modules into the model; the paths that the policy took for its own."""
        policy = self._policy or policy_of(model, None)
        placement = Placement(model, plan, builder)
        snapshot = ModelSnapshot(model)
        policy.placement = placement
        try:
            self._shared = self._shard(model, policy)
            foreign = placement.foreign_paths()
        except InferenceShardformerError:
            snapshot.restore()
            raise
        except Exception as exc:  # a policy may raise anything
            snapshot.restore()
            raise _policy_error(policy, exc) from exc
        finally:
            policy.placement = None
        self._foreign = placement.foreign_modules()
        return foreign

    def _shard(self, model: nn.Module, policy: Policy | PlacesNoPadding) -> SharedParams:
        if self.shard_config is None:
            self.shard_config: ColossalShardConfig = colossal_config(self._process_group)
        if isinstance(policy, PlacesNoPadding):
            policy.set_model(model)
            policy.set_shard_config(self.shard_config)
            check_coverage(policy.module_policy(), model)
        with mended_cpu_accelerator(CpuAccelerator):
            shared: SharedParams = ModelSharder(model=model, policy=policy, shard_config=self.shard_config).shard()
        return shared

    def _run_alone(self, model: PreTrainedModel, policy: Policy) -> SharedParams:
        """Let somebody else's policy shard the model, as ColossalAI's ShardFormer would, on all ranks."""
        ranks = self._begin("optimize()", lambda: model_in_memory(model))
        self._alone, self._state = type(policy).__name__, State.FAILED
        shared = ranks.guard.together("sharding", lambda: self._shard(model, policy))
        self._state = State.SHARDED
        return shared

    def _finish(self, prepared: Prepared, sharded: Sharded) -> PreTrainedModel:
        for module in self._foreign:
            module.to(device=self.group.device, dtype=prepared.config.torch_dtype).requires_grad_(False)
        return super()._finish(prepared, sharded)

    def _held(self, call: str, model: PreTrainedModel | None = None) -> tuple[Prepared, Sharded, Ranks]:
        if self._alone and self._prepared is None:
            raise StateError(
                f"{call} needs modules of ours, and {self._alone} sharded the model without them",
                remedy="derive the policy from InferencePolicy or LlamaInferencePolicy of this bridge, whose "
                "descriptions it can add to, or use the model as ColossalAI does",
            )
        if self._foreign and call in _WHOLE:
            raise StateError(
                f"{call} would have to know how {type(self._foreign[0]).__name__} cuts its weights, which its policy "
                "alone does",
                remedy="keep the original model, or shard without modules of your own",
            )
        return super()._held(call, model)


def _policy_error(policy: object, exc: Exception) -> PolicyError:
    """What a policy raised, as an error of ours; ModelSharder hides some behind a RuntimeError of its own."""
    cause = exc.__context__ if isinstance(exc, RuntimeError) and exc.__context__ is not None else exc
    return PolicyError(
        f"{type(policy).__name__} failed in ColossalAI's ModelSharder: {type(cause).__name__}: {cause}",
        remedy="correct the policy; the model has its own modules again",
    )
