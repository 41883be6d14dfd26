"""Our own backends pass the kit that plug-in authors get."""

from __future__ import annotations

from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.conformance import backend_suite

TestSdpa = backend_suite(SdpaAttention)
TestReference = backend_suite(ReferenceAttention)
