"""The native linear kernels beside what bounds them: a pure read of as much memory, and torch's own products."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarking.workloads import SHAPES
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear import linear
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, WeightArena, pack

CREW_ROWS = (1, 2, 4, 8, 16)  # that threads share out in one native call
MORE_ROWS = (32, 64)
PREFILL_ROWS = 1024
_SHARES = 8  # into which a crew cuts a thread's work
_LINE = 64


@dataclass(frozen=True)
class Layers:
    """The projections of a whole model, plain and packed, in the order in which a step reads them."""

    plain: list[torch.Tensor]
    packed: list[PackedWeight]

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return sum(weight.num_bytes for weight in self.packed)


def report_roofline(shape: str, *, threads: int, rounds: int) -> None:
    """Print bandwidth for few rows and the matrix rate for many, ours and torch's and the bound of both."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        layers = _layers(shape)
        _report_bandwidth(layers, threads, rounds)
        _report_rate(layers, rounds)


def _layers(shape: str) -> Layers:
    facts = SHAPES[shape]
    hidden, intermediate, vocab, heads, kv_heads, count = (
        int(str(facts[name]))
        for name in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
        )
    )
    qkv = (heads + 2 * kv_heads) * (hidden // heads)
    sizes = [(qkv, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)] * count
    plain = [torch.randn(size).mul_(0.02).to(torch.bfloat16) for size in (*sizes, (vocab, hidden))]
    arena = WeightArena()
    return Layers(plain, [pack(weight, arena=arena) for weight in plain])


def _report_bandwidth(layers: Layers, threads: int, rounds: int) -> None:
    memory = WeightArena().take(layers.num_bytes // 4096 * 4096).fill_(1)  # or every page would be the same one
    read = native().function("isf_read_memory", argtypes=(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32))
    print(f"all linears of a step, {layers.num_bytes / 2**20:.0f} MiB of bf16 weights: GB/s, and share of a pure read")
    print("ours in one native call, as in a decoder layer, up to 16 rows; else, and torch's, one by one from Python")
    for rows in (*CREW_ROWS, *MORE_ROWS):
        inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(torch.bfloat16) for weight in layers.plain}
        sides: dict[str, Callable[[], object]] = {
            "read": lambda: read(memory.data_ptr(), memory.nbytes, threads),
            "ours": _in_one_call(layers, inputs, threads)
            if rows in CREW_ROWS
            else lambda inputs=inputs: [linear(inputs[w.in_features], w) for w in layers.packed],
            "torch": lambda inputs=inputs: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in layers.plain],
        }
        seconds = _take_turns(sides, rounds)
        speed = {name: layers.num_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
        share = statistics.median(a / b for a, b in zip(seconds["read"], seconds["ours"], strict=True))
        print(
            f"  {rows:3} rows: read {speed['read']:6.1f}   ours {speed['ours']:6.1f} ({share:4.0%})   "
            f"torch {speed['torch']:6.1f}",
            flush=True,
        )


def _in_one_call(layers: Layers, inputs: Mapping[int, torch.Tensor], threads: int) -> Callable[[], object]:
    """All layers one after the other, without Python between them."""
    run = native().function("isf_run_linears", argtypes=(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32))
    size = native().function(
        "isf_linear_workspace", argtypes=(ctypes.POINTER(LinearArgs), ctypes.c_int32), restype=ctypes.c_int64
    )
    rows = len(next(iter(inputs.values())))
    calls = (LinearArgs * len(layers.packed))(
        *(_arguments(weight, inputs[weight.in_features]) for weight in layers.packed)
    )
    out = torch.empty(rows, max(weight.out_features for weight in layers.packed), dtype=torch.bfloat16)
    room = torch.empty(max(size(call, threads * _SHARES) for call in calls) + _LINE, dtype=torch.uint8)
    for call in calls:
        call.out = out.data_ptr()
        call.workspace = -(-room.data_ptr() // _LINE) * _LINE

    def step() -> tuple[object, ...]:
        run(ctypes.addressof(calls), len(calls), threads)
        return out, room  # what the arguments point to

    return step


def _arguments(weight: PackedWeight, x: torch.Tensor) -> LinearArgs:
    return LinearArgs(
        x=x.data_ptr(),
        weight=weight.storage_pointer,
        m=len(x),
        n=weight.out_features,
        k=weight.in_features,
        ldx=weight.in_features,
        ldr=weight.out_features,
        ldo=weight.out_features,
        weight_dtype=weight.dtype_code,
        activation_dtype=weight.dtype_code,
        out_dtype=weight.dtype_code,
        segments=weight.segments,
    )


def _report_rate(layers: Layers, rounds: int) -> None:
    """Over the projections of the layers; a prompt needs the head for its last token only."""
    plain, packed = layers.plain[:-1], layers.packed[:-1]
    operations = 2 * PREFILL_ROWS * sum(weight.numel() for weight in plain)
    inputs = {weight.shape[1]: torch.randn(PREFILL_ROWS, weight.shape[1]).to(torch.bfloat16) for weight in plain}
    seconds = _take_turns(
        {
            "ours": lambda: [linear(inputs[w.in_features], w) for w in packed],
            "torch": lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in plain],
        },
        rounds,
    )
    rate = {name: operations / statistics.median(values) / 1e9 for name, values in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["torch"], strict=True))
    print(
        f"  {PREFILL_ROWS} rows: ours {rate['ours']:.0f} GFLOP/s, torch's bf16 products {rate['torch']:.0f} "
        f"(ours x {ratio:.2f})\n",
        flush=True,
    )


def _take_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}
