"""WeightStorage: bytes of the weights that a plan puts on a rank, as the linear kernel stores them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from inference_shardformer.compute.linear import LinearKernel, LinearShape
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, ShardingPlan
from inference_shardformer.sharding.styles import padded_vocab_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GATED = ("gate_up", "packed_column")
_PROJECTIONS = ("column", "qkv", "packed_qkv", "interleaved_qkv", "row", "partial_row", *_GATED)


@dataclass(frozen=True)
class WeightStorage:
    """What parameters take in memory: the one place that knows. `embeddings` are the paths of the model's tables."""

    kernel: LinearKernel
    embeddings: Collection[str]

    @classmethod
    def of(cls, kernel: LinearKernel, unsharded: PreTrainedModel) -> WeightStorage:
        """The storage of a model's parameters by this kernel; `unsharded` may be on the meta device."""
        return cls(kernel, embedding_paths(unsharded))

    def parameter_bytes(self, plan: ShardingPlan, module: ModulePlan, parameter: ParameterPlan) -> int:
        """Bytes of one parameter on its rank, with the padding of the plan and of the kernel."""
        is_matrix = len(parameter.shape) == 2 and parameter.name == f"{module.path}.weight"
        if not is_matrix or not self._is_of_kernel(plan, module):
            return parameter.num_elements * self.kernel.spec.dtype.itemsize
        return self._matrix_bytes(
            *parameter.shape, is_gated=module.style in _GATED, is_table=module.path in self.embeddings
        )

    def copy_bytes(self, plan: ShardingPlan, module: ModulePlan) -> int:
        """Bytes of a tied head's own copy: there is one where tables are kept and heads are quantised."""
        if module.tied_to is None or self.kernel.spec.quantization is None:
            return 0
        part = padded_vocab_part(plan.facts.vocab_size, plan.layout.tp_size)
        return self._matrix_bytes(part, plan.facts.hidden_size)

    def weight_bytes(self, plan: ShardingPlan) -> int:
        """Bytes of all parameters of a rank; what is tied counts once."""
        return sum(
            self.copy_bytes(plan, module)
            + sum(self.parameter_bytes(plan, module, parameter) for parameter in module.parameters)
            for module in plan.modules
        )

    def _is_of_kernel(self, plan: ShardingPlan, module: ModulePlan) -> bool:
        """Whether the linear kernel stores it: projections, the head, and the table that is also the head."""
        is_table = module.path in self.embeddings
        is_vocab = module.style == "vocab" and (plan.facts.tie_word_embeddings or not is_table)
        return is_vocab or module.style in _PROJECTIONS

    def _matrix_bytes(self, out_features: int, in_features: int, **kind: bool) -> int:
        return self.kernel.num_bytes(LinearShape(in_features, out_features, self.kernel.spec.dtype, **kind))


def embedding_paths(unsharded: nn.Module) -> frozenset[str]:
    """Where a model keeps tables that are looked up by row."""
    return frozenset(path for path, module in unsharded.named_modules() if isinstance(module, nn.Embedding))
