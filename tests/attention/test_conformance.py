"""Our own backends pass the kit that plug-in authors get."""

from __future__ import annotations

import pytest

from inference_shardformer.attention.cpu import CpuAttention
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.conformance import backend_suite
from inference_shardformer.kernels.cpu.library import native_problem

TestSdpa = backend_suite(SdpaAttention)
TestReference = backend_suite(ReferenceAttention)
TestCpu = pytest.mark.skipif(native_problem() is not None, reason="there are no native kernels here")(
    backend_suite(CpuAttention)
)
