"""The native linear kernels beside what bounds them: a pure read of as much memory, and torch's own products."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarking.workloads import SHAPES
from inference_shardformer.kernels.cpu.arguments import DTYPES
from inference_shardformer.kernels.cpu.compact_weight import CompactWeight, compression_gains, empty_compact_weight
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear import linear
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, WeightArena, pack

CREW_ROWS = (1, 2, 4, 8, 16)  # that threads share out in one native call
MORE_ROWS = (32, 64)
PREFILL_ROWS = 1024
_LINE = 64


@dataclass(frozen=True)
class Layers:
    """The projections of a whole model, plain and packed, in the order in which a step reads them."""

    plain: list[torch.Tensor]
    forms: dict[str, list[PackedWeight]]  # "packed", and "compact" where the engine compresses

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return sum(weight.num_bytes for weight in self.forms["packed"])


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
    forms = {"packed": [pack(weight, arena=arena) for weight in plain]}
    if compression_gains():
        forms["compact"] = [_compressed(weight, arena) for weight in plain]
    arena.keep_nothing()
    return Layers(plain, forms)


def _compressed(weight: torch.Tensor, arena: WeightArena) -> CompactWeight:
    compact = empty_compact_weight(*weight.shape, is_filled=True, arena=arena)
    compact.write(weight)
    compact.settle()
    return compact


def _report_bandwidth(layers: Layers, threads: int, rounds: int) -> None:
    memory = WeightArena().take(layers.num_bytes // 4096 * 4096).fill_(1)  # or every page would be the same one
    read = native().function("isf_read_memory", argtypes=(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32))
    print(f"all linears of a step, {layers.num_bytes / 2**20:.0f} MiB of bf16 weights: GB/s, and share of a pure read")
    print("ours in one native call, as in a decoder layer, up to 16 rows; else, and torch's, one by one from Python;")
    print("compact weights count as the bf16 that they are bit for bit: a share over 100% is more than could be read")
    for rows in (*CREW_ROWS, *MORE_ROWS):
        inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(torch.bfloat16) for weight in layers.plain}
        sides: dict[str, Callable[[], object]] = {"read": lambda: read(memory.data_ptr(), memory.nbytes, threads)}
        for name, form in layers.forms.items():
            sides[name] = _in_one_call(form, inputs, threads) if rows in CREW_ROWS else _one_by_one(form, inputs)
        sides["torch"] = lambda inputs=inputs: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in layers.plain]
        seconds = _take_turns(sides, rounds)
        shown = []
        for name, values in seconds.items():
            share = statistics.median(a / b for a, b in zip(seconds["read"], values, strict=True))
            speed = layers.num_bytes / statistics.median(values) / 1e9
            shown.append(f"{name} {speed:6.1f}" + (f" ({share:4.0%})" if name in layers.forms else ""))
        print(f"  {rows:3} rows: {'   '.join(shown)}", flush=True)


def _one_by_one(form: list[PackedWeight], inputs: Mapping[int, torch.Tensor]) -> Callable[[], object]:
    return lambda: [linear(inputs[weight.in_features], weight) for weight in form]


def _in_one_call(form: list[PackedWeight], inputs: Mapping[int, torch.Tensor], threads: int) -> Callable[[], object]:
    """All layers one after the other, without Python between them."""
    run = native().function("isf_run_linears", argtypes=(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32))
    size = native().function(
        "isf_linear_workspace", argtypes=(ctypes.POINTER(LinearArgs), ctypes.c_int32), restype=ctypes.c_int64
    )
    rows = len(next(iter(inputs.values())))
    calls = (LinearArgs * len(form))(*(_arguments(weight, inputs[weight.in_features]) for weight in form))
    out = torch.empty(rows, max(weight.out_features for weight in form), dtype=torch.bfloat16)
    room = torch.empty(max(size(call, threads) for call in calls) + _LINE, dtype=torch.uint8)
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
        activation_dtype=DTYPES[x.dtype],
        out_dtype=DTYPES[x.dtype],
        segments=weight.segments,
    )


def _report_rate(layers: Layers, rounds: int) -> None:
    """Over the projections of the layers; a prompt needs the head for its last token only."""
    plain = layers.plain[:-1]
    operations = 2 * PREFILL_ROWS * sum(weight.numel() for weight in plain)
    inputs = {weight.shape[1]: torch.randn(PREFILL_ROWS, weight.shape[1]).to(torch.bfloat16) for weight in plain}
    sides = {name: _one_by_one(form[:-1], inputs) for name, form in layers.forms.items()}
    sides["torch"] = lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in plain]
    seconds = _take_turns(sides, rounds)
    shown = []
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(values, seconds["torch"], strict=True))
        shown.append(f"{name} {operations / statistics.median(values) / 1e9:.0f} (x {ratio:.2f})")
    print(f"  {PREFILL_ROWS} rows, GFLOP/s, and by torch's bf16 products: {'   '.join(shown)}\n", flush=True)


def _take_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}
