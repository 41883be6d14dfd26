"""The rotary kernel in Triton."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from inference_shardformer.attention.base import KVLayout
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.rotary_write import FusedRotaryWrite
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.probing.requirement import Requirement


class TritonRotaryWrite(FusedRotaryWrite):
    """One launch between the projection and attention; computes in float32 and stores e4m3 as well."""

    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cuda",))
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)
    cache_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float8_e4m3fn,)

    def __init__(self, spec: ComputeSpec) -> None:
        from inference_shardformer.kernels.triton.rotary import rotary_and_write_kv  # imports Triton

        super().__init__(spec)
        self._run = rotary_and_write_kv

    def rotate_and_write(
        self,
        heads: torch.Tensor,
        cache: LayerKVCache,
        slot_mapping: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: KVLayout,
    ) -> torch.Tensor:
        """As the contract says."""
        order: Literal["NHD", "HND"] = "HND" if layout is KVLayout.HND else "NHD"
        return self._run(heads.flatten(1), cache.keys, cache.values, slot_mapping, cos=cos, sin=sin, layout=order)
