"""MoEPolicy: a decoder like LLaMA whose MLPs are mixtures of experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaMLP
from inference_shardformer.modeling.nopadding_moe import NoPaddingMoE, NoPaddingMoEWithLogits
from inference_shardformer.policies.base import BuildContext, PolicyEntry
from inference_shardformer.policies.decoder import LlamaShapedPolicy
from inference_shardformer.policies.rows import gate_up, partial_row, replace, replicate
from inference_shardformer.sharding.plan import TensorInfo
from inference_shardformer.sharding.stored import StoredTensor, as_it_is

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PACKED, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"  # what transformers 5 keeps for all experts together


class MoEPolicy(LlamaShapedPolicy):
    """Cuts the intermediate features of every expert over the ranks; the router is whole on each.

    A family names the `projections` of an expert in its checkpoints: gate, up, down. `layer_expects_logits`: the layer
    of transformers 4 wants those of the router as well.
    """

    projections: ClassVar[tuple[str, str, str]]
    layer_expects_logits: ClassVar[bool] = True
    can_capture: ClassVar[bool] = True
    has_experts: ClassVar[bool] = True
    served: ClassVar[Mapping[str, object]] = MappingProxyType({"output_router_logits": False})

    @abstractmethod
    def normalises(self, hf_config: PreTrainedConfig) -> bool:
        """Whether the weights of a token's experts are scaled to add up to one."""

    def mlp_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """The mixture of a layer, each expert by itself."""
        gate, up, down = self.projections
        return (
            replace(path, native_class=f"{self.family}SparseMoeBlock", build=self._mixture),
            replicate(f"{path}.gate"),
            gate_up(f"{path}.experts.*.gate_up_proj", gate, up),
            partial_row(f"{path}.experts.*.down_proj", down),
        )

    def stored(self, tensors: Mapping[str, TensorInfo]) -> tuple[StoredTensor, ...]:
        """Checkpoints keep every expert's projections apart, whatever the model does."""
        return tuple(part for name, info in tensors.items() for part in self._parts(name, info))

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a tensor that the rows call `name`."""
        return name

    def _parts(self, name: str, info: TensorInfo) -> list[StoredTensor]:
        gate, up, down = self.projections
        if name.endswith(_DOWN):
            pieces: dict[str, tuple[int, int] | None] = {down: None}
        elif name.endswith(_PACKED):
            half = info.shape[1] // 2
            pieces = {gate: (0, half), up: (half, 2 * half)}
        elif self.stored_name(name) == name:
            return [as_it_is(name)]
        else:
            return [StoredTensor(self.stored_name(name), row=name, tensor=name)]
        experts = name.rpartition(".")[0]
        parts = []
        for number in range(info.shape[0]):
            for leaf, rows in pieces.items():
                own = f"{experts}.{number}.{leaf}.weight"
                parts.append(StoredTensor(self.stored_name(own), row=own, tensor=name, index=number, rows=rows))
        return parts

    def _mixture(self, native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        from transformers.activations import ACT2FN

        config, is_one_by_one = context.hf_config, isinstance(native.experts, nn.ModuleList)
        act_fn = ACT2FN[config.hidden_act]
        count = sum(name.endswith(".gate_up_proj") for name in children)
        experts = {
            number: NoPaddingLlamaMLP(
                gate_up_proj=children[f"experts.{number}.gate_up_proj"],
                down_proj=children[f"experts.{number}.down_proj"],
                act_fn=act_fn,
            )
            for number in range(count)
        }
        block = NoPaddingMoEWithLogits if is_one_by_one and self.layer_expects_logits else NoPaddingMoE
        return block(
            gate=children["gate"],
            experts=experts,
            top_k=int(config.num_experts_per_tok),
            normalises=self.normalises(config),
            group=context.group,
            kernel=context.kernels.experts,
        )
