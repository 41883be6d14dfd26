"""Backend `triton` passes the kit in Triton's interpreter, where its kernels run on the CPU.

Not collected by its name: `test_triton.py` runs it in a process of its own, in which the interpreter is on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import triton_interpreter

from inference_shardformer.attention.base import AttentionCapabilities
from inference_shardformer.attention.triton import TritonAttention
from inference_shardformer.conformance import backend_suite

triton_interpreter.mend_bfloat16()


class InterpretedTriton(TritonAttention):
    """The backend as it is, but for the device it declares, and in float32 alone: the interpreter is slow.

    The kernels' own tests, `tests/kernels/interpreted`, are run in every type.
    """

    capabilities: ClassVar[AttentionCapabilities] = replace(
        TritonAttention.capabilities, devices=("cpu",), dtypes=(torch.float32,)
    )
    requires = ()


TestTriton = backend_suite(InterpretedTriton)

del TestTriton.test_memory_stays_flat  # a minute of the interpreter's own allocations, none of a device
