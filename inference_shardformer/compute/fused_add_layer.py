"""Decoder layers of LLaMA's shape by their modules, with the sum before the second norm made in the norm's kernel."""

from __future__ import annotations

from typing import ClassVar

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.decoder_layer import DecoderLayerKernel, LayerParts


class FusedAddLayer(DecoderLayerKernel):
    """Puts our layer in Hugging Face's place, for the sake of a norm kernel that adds the residual itself."""

    name: ClassVar[str] = "fused_add"
    contract_version: ClassVar[int] = 1
    runs_whole: ClassVar[bool] = True
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu", "cuda"))

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Layers of another shape, and norms that add nothing."""
        found = []
        if spec.layer_shape != "llama":
            message = "the model's decoder layers are not of LLaMA's shape"
            found.append(Reason("layer_shape", message, "nothing is wrong: their modules run one by one"))
        if not spec.norm_adds:
            message = f"the norm kernel {spec.chosen.get('norm', '')!r} does not add the residual itself"
            found.append(Reason("norm", message, "choose another inference.kernels.norm, or leave it to auto"))
        return found

    def bind(self, parts: LayerParts) -> None:
        """Its modules run, one by one."""
        return
