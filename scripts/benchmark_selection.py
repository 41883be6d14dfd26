"""What does choosing the attention backend inside `forward` cost, against a backend bound at construction?

The same model, kernels and requests decode under both designs, which take turns step by step in one run. The one in
`forward` does, for every layer of every step, what ColossalAI's engine did before its backends moved to construction:
an import attempt of flash-attn, a look-up by flags, and the construction of the backend object. Printed for each shape:
the median step time of both, and the median cost of choosing in `forward` with a 95% confidence interval (bootstrap
over pairs of steps).

    python scripts/benchmark_selection.py --threads 2 --steps 200
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention

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


def time_steps(
    shardformer: InferenceShardformer, engine: InferenceEngine, *, batch: int, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds of each decode step: bound at construction, chosen in forward; the two take turns, order swapped."""
    modules = attention_modules(shardformer.sharded.model)
    bound = modules[0].backend
    selecting = SelectingBackend(bound)
    for index in range(batch):
        engine.add_request([1 + index, 2, 3], SamplingParams(max_new_tokens=2 * steps + 40, ignore_eos=True))
    for _ in range(20):
        engine.step()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(steps):
        for in_forward in (False, True) if number % 2 else (True, False):
            for module in modules:
                module.backend = selecting if in_forward else bound
            start = time.perf_counter()
            engine.step()
            seconds[in_forward].append(time.perf_counter() - start)
    return seconds[False], seconds[True]


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
                bound, selecting = time_steps(shardformer, engine, batch=batch, steps=args.steps)
            cost, low, high = confidence_interval(bound, selecting)
            a, b = statistics.median(bound) * 1e3, statistics.median(selecting) * 1e3
            print(
                f"{name:30} batch {batch}: {a:7.3f} ms bound, {b:7.3f} ms chosen in forward: "
                f"{cost:+.1%} a step, 95% interval {low:+.1%} to {high:+.1%}",
                flush=True,
            )
            result = {"shape": name, "batch": batch, "bound_ms": a, "in_forward_ms": b, "cost": [cost, low, high]}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
