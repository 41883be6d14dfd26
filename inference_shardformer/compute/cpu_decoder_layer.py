"""The native decoder layers: each of them, or all, in one call, on one team of threads."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.cpu import CpuAttention
from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.cpu_layers import BoundLayer, LayerChain, SharedStep
from inference_shardformer.compute.cpu_linear import PackedLinearWeight
from inference_shardformer.compute.cpu_model import WholeModel
from inference_shardformer.compute.decoder_layer import (
    DecoderLayerKernel,
    LayerFunction,
    LayerParts,
    ModelEnds,
    ModelFunction,
)
from inference_shardformer.compute.torch_kernels import PlainWeight
from inference_shardformer.kernels.cpu.decoder_layer import LayerWorkspace

_NEEDED = {"attention": ("cpu",), "linear": ("cpu",), "activation": ("fused",), "all_reduce": ("none", "shm")}


class CpuDecoderLayer(DecoderLayerKernel):
    """Runs layers of LLaMA's shape whole, where everything in them is native."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    runs_whole: ClassVar[bool] = True
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

    def __init__(self, spec: ComputeSpec) -> None:
        super().__init__(spec)
        self._workspace = LayerWorkspace()
        self._chain = LayerChain()
        self._steps: WeakKeyDictionary[AttentionBackend, SharedStep] = WeakKeyDictionary()

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Layers of another shape, and choices that are not native."""
        found = []
        if spec.layer_shape != "llama":
            message = "the model's decoder layers are not of LLaMA's shape"
            found.append(Reason("layer_shape", message, "nothing is wrong: their modules run one by one"))
        for choice, names in _NEEDED.items():
            chosen = spec.chosen.get(choice, "")
            if chosen not in names:
                message = f"it needs {choice} by {' or '.join(names)}, and that is by {chosen or 'nothing'}"
                found.append(Reason("choices", message, f"let {choice} be chosen by auto"))
        return found

    def were_all_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether one native call ran them."""
        return self._chain.is_result(hidden_states)

    def bind(self, parts: LayerParts) -> LayerFunction | None:
        """The layer as one call; `None` while another attention backend serves it, or sums are not shared memory's.

        Once every layer is bound, and to one backend, the first call of a step runs them all.
        """
        self._chain.pop(parts.layer_idx)
        is_summed = parts.group.size == 1 or parts.group.shared_sums is not None
        if not (isinstance(parts.backend, CpuAttention) and is_summed):
            return None
        step = self._steps.setdefault(parts.backend, SharedStep(self._workspace))
        layer = BoundLayer(parts, self.spec, step, self._chain)
        self._chain.add(layer)
        return layer.run

    def bind_model(self, ends: ModelEnds) -> ModelFunction | None:
        """The bound layers with the ends of their model in one call; `None` where these are stored in another way."""
        is_known = isinstance(ends.embedding, (PackedLinearWeight, PlainWeight))
        if not (is_known and isinstance(ends.head.weight, PackedLinearWeight)):
            return None
        return WholeModel(ends, self.spec, self._chain)
