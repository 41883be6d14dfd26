"""What does choosing the attention backend inside `forward` cost, against a backend bound at construction?

The same model, kernels and requests decode under three designs, which take turns step by step in one run. The ones in
`forward` do, for every layer of every step, what ColossalAI's engine did before its backends moved to construction: an
import attempt of flash-attn, a look-up by flags, and the construction of the backend object; once where flash-attn is
absent (Python searches for it anew each time) and once where it is installed (a stand-in is). Printed for each shape:
the median step times, and the median cost of choosing in `forward` with a 95% confidence interval (bootstrap over pairs
of steps).

    python scripts/benchmark_selection.py --threads 2 --steps 200
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention

BOUND = "bound at construction"
ABSENT = "chosen in forward, flash-attn absent"
INSTALLED = "chosen in forward, flash-attn installed"
DESIGNS = (BOUND, ABSENT, INSTALLED)
SHAPES = {
    "tiny (4 layers, hidden 128)": (4, 128, 384, 4, 2, 2048),
    "15M (6 layers, hidden 288)": (6, 288, 768, 6, 6, 32000),
    "135M (30 layers, hidden 576)": (30, 576, 1536, 9, 3, 49152),
}


@dataclass(frozen=True)
class Flags:
    """The settings the old design looked at in every call."""

    use_spec_dec: bool = False
    use_cuda_kernel: bool = False
    use_flash_attn: bool = True
    dtype: torch.dtype = torch.bfloat16


def can_use_flash_attention(flags: Flags) -> bool:
    """An import attempt in every call."""
    if flags.dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass
class SelectingBackend:
    """Chooses a backend in every call and hands the work to it: the old design around the same kernels."""

    bound: AttentionBackend
    flags: Flags = field(default_factory=Flags)

    @property
    def spec(self) -> object:
        """The bound backend's."""
        return self.bound.spec

    def choose(self) -> AttentionBackend:
        """Look at flags and libraries, then construct the backend; the result is always the same one."""
        kinds = {(False, False): type(self.bound), (False, True): type(self.bound), (True, False): type(self.bound)}
        has_flash = self.flags.use_flash_attn and can_use_flash_attention(self.flags)
        if self.flags.use_spec_dec:
            kind = kinds[True, False]
        elif self.flags.use_cuda_kernel and has_flash:
            kind = kinds[False, True]
        else:
            kind = kinds[False, False]
        return kind(self.bound.spec)

    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """Choose by flags, then write."""
        target = self.bound if not self.flags.use_cuda_kernel else self.choose()
        target.write(k, v, cache, meta)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Choose, then attend."""
        return self.choose().attend(q, cache, meta)


def attention_modules(model: nn.Module) -> list[NoPaddingLlamaAttention]:
    """Every attention module of a sharded model."""
    return [module for module in model.modules() if isinstance(module, NoPaddingLlamaAttention)]


def make_engine(shape: tuple[int, ...], threads: int, batch: int) -> tuple[InferenceShardformer, InferenceEngine]:
    """An engine over random bf16 weights, with a running batch of decodes."""
    layers, hidden, intermediate, heads, kv_heads, vocab = shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    shardformer = InferenceShardformer(
        ShardConfig(device="cpu", threads_per_rank=threads),
        InferenceConfig.model_validate({"dtype": "bf16", "scheduler": {"max_num_seqs": batch}}),
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        engine = shardformer.attach(shardformer.from_pretrained(folder))
    return shardformer, engine


def make_available(*, is_installed: bool) -> None:
    """Let `import flash_attn` find a stand-in, or nothing."""
    if is_installed:
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = None  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = module
    else:
        sys.modules.pop("flash_attn", None)


def time_steps(
    shardformer: InferenceShardformer, engine: InferenceEngine, *, batch: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each decode step of every design; they take turns, in an order that moves on with every round."""
    modules = attention_modules(shardformer.sharded.model)
    bound = modules[0].backend
    selecting = SelectingBackend(bound)
    for index in range(batch):
        engine.add_request([1 + index, 2, 3], SamplingParams(max_new_tokens=len(DESIGNS) * steps + 40, ignore_eos=True))
    for _ in range(20):
        engine.step()
    seconds: dict[str, list[float]] = {design: [] for design in DESIGNS}
    for number in range(steps):
        shift = number % len(DESIGNS)
        for design in (*DESIGNS[shift:], *DESIGNS[:shift]):
            make_available(is_installed=design == INSTALLED)
            for module in modules:
                module.backend = bound if design == BOUND else selecting
            start = time.perf_counter()
            engine.step()
            seconds[design].append(time.perf_counter() - start)
    make_available(is_installed=False)
    return seconds


def confidence_interval(bound: list[float], selecting: list[float]) -> tuple[float, float, float]:
    """Median cost of choosing in forward as a fraction of a step, with its 95% interval (bootstrap over pairs)."""
    ratios = torch.tensor([b / a - 1 for a, b in zip(bound, selecting, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(ratios), (2000, len(ratios)), generator=generator)
    medians = ratios[picks].median(dim=1).values.sort().values
    return ratios.median().item(), medians[49].item(), medians[1949].item()


def main() -> None:
    """Measure every shape and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, action="append", help="decoding sequences; default: 1 and 8")
    args = parser.parse_args()
    for name, shape in SHAPES.items():
        for batch in args.batch or [1, 8]:
            shardformer, engine = make_engine(shape, args.threads, batch)
            with shardformer:
                seconds = time_steps(shardformer, engine, batch=batch, steps=args.steps)
            bound = statistics.median(seconds[BOUND]) * 1e3
            print(f"{name:30} batch {batch}: {bound:7.3f} ms a step, bound at construction", flush=True)
            for design in (ABSENT, INSTALLED):
                cost, low, high = confidence_interval(seconds[BOUND], seconds[design])
                print(f"{'':30} {design}: {cost:+.1%} a step, 95% interval {low:+.1%} to {high:+.1%}", flush=True)
                result = {"shape": name, "batch": batch, "design": design, "bound_ms": bound, "cost": [cost, low, high]}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
