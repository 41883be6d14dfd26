"""The native rotary kernel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from inference_shardformer.attention.base import KVLayout
from inference_shardformer.compute.base import ComputeCapabilities
from inference_shardformer.compute.rotary_write import FusedRotaryWrite
from inference_shardformer.kernels.cpu.rotary import rotary_and_write_kv
from inference_shardformer.kv_cache.cache import LayerKVCache


class CpuRotaryWrite(FusedRotaryWrite):
    """One native call between the projection and attention; computes in float32."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

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
        return rotary_and_write_kv(
            heads.flatten(1), cache.keys, cache.values, slot_mapping, cos=cos, sin=sin, layout=order
        )
