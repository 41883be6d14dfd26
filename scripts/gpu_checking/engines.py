"""The engine beside Hugging Face on one model in memory: equal tokens, then times of three workloads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from benchmarking.hugging_face import run_continuous
from benchmarking.workloads import Workload, ragged, single
from transformers import LlamaForCausalLM

from gpu_checking.models import free_memory, prefill_flops, read_bytes_per_token
from gpu_checking.roofline import Roofline
from gpu_checking.section import Budget, Row
from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.resolved import TORCH_DTYPES
from inference_shardformer.config.sources import ConfigSources

Run = Callable[[Workload], float]
"""Seconds of one workload."""


class Sizes(NamedTuple):
    """How large the workloads are."""

    decode_prompt: int = 128
    decode_tokens: int = 128
    prefill_prompt: int = 1024
    ragged_requests: int = 256


class Mode(NamedTuple):
    """One way to run the engine; `settings` are those of the configuration, as text."""

    name: str
    settings: dict[str, object]


def greedy_rows(
    model: LlamaForCausalLM, device: torch.device, modes: Sequence[Mode], *, new_tokens: int = 24
) -> Iterator[Row]:
    """Tokens of ragged prompts, equal to Hugging Face's `generate` one by one."""
    prompts = [prompt[:40] for prompt in ragged(8, vocab_size=model.config.vocab_size).prompts]
    expected = [hf_greedy(model, prompt, new_tokens, device) for prompt in prompts]
    for mode in modes:
        with _Engine(model, mode, device, num_requests=len(prompts)) as engine:
            outputs = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
            served = _served(engine)
        equal = sum(list(output.token_ids) == wanted for output, wanted in zip(outputs, expected, strict=True))
        value = f"{equal} of {len(prompts)} requests equal Hugging Face generate, token for token; {served}"
        yield Row(mode.name, value, equal == len(prompts), {"equal": equal, "requests": len(prompts)})


def speed_rows(
    model: LlamaForCausalLM,
    device: torch.device,
    modes: Sequence[Mode],
    bounds: Roofline,
    budget: Budget,
    *,
    sizes: Sizes,
    rounds: int = 3,
) -> Iterator[Row]:
    """Hugging Face first, on the whole model; then every mode of the engine over the same weights."""
    vocab = model.config.vocab_size
    works = {
        "decode, batch 1": single(sizes.decode_prompt, sizes.decode_tokens, vocab_size=vocab),
        f"prefill {sizes.prefill_prompt}": single(sizes.prefill_prompt, 1, vocab_size=vocab),
        f"{sizes.ragged_requests} ragged": ragged(sizes.ragged_requests, vocab_size=vocab),
    }
    weights, flops = read_bytes_per_token(model), prefill_flops(model, sizes.prefill_prompt)
    sides: dict[str, dict[str, float]] = {"hf generate": {}, "hf continuous": {}}
    names = list(works)
    sides["hf generate"] = _times(_hf_generate(model, device), {name: works[name] for name in names[:2]}, rounds)
    yield from _said("hf generate", sides["hf generate"], works, weights, flops, bounds)
    try:
        sides["hf continuous"] = _times(_hf_continuous(model, sizes.ragged_requests), {names[2]: works[names[2]]}, 1)
        yield from _said("hf continuous", sides["hf continuous"], works, weights, flops, bounds)
    except Exception as exc:  # noqa: BLE001 - a side of a comparison that fails is a finding, not the end
        yield Row("hf continuous", f"could not be run: {type(exc).__name__}: {exc}")
    free_memory(device)
    for mode in modes:
        if budget.left < 0:
            yield Row(mode.name, "left out: no time is left")
            continue
        with _Engine(model, mode, device, num_requests=sizes.ragged_requests) as engine:
            taken = _times(_ours(engine), works, rounds)
            yield Row(f"{mode.name}: served by", _served(engine))
        yield from _said(mode.name, taken, works, weights, flops, bounds)
        for name, seconds in taken.items():
            other = sides["hf generate"].get(name) or sides["hf continuous"].get(name)
            if other:
                yield Row(
                    f"{mode.name}: {name}", f"{other / seconds:.2f} x Hugging Face", data={"ratio": other / seconds}
                )
        free_memory(device)


def rounded_rows(
    model: LlamaForCausalLM, mode: Mode, device: torch.device, bounds: Roofline, *, sizes: Sizes, rounds: int = 3
) -> Iterator[Row]:
    """Decode and prefill by an engine that rounds; where it rounds weights, the model is not itself afterwards."""
    vocab = model.config.vocab_size
    works = {
        "decode, batch 1": single(sizes.decode_prompt, sizes.decode_tokens, vocab_size=vocab),
        f"prefill {sizes.prefill_prompt}": single(sizes.prefill_prompt, 1, vocab_size=vocab),
    }
    flops = prefill_flops(model, sizes.prefill_prompt)
    with _Engine(model, mode, device, num_requests=16, is_restored="weights" not in mode.settings) as engine:
        taken = _times(_ours(engine), works, rounds)
        held = sum(parameter.nbytes for parameter in model.parameters())
        weights = held - _table_bytes(model)
        yield Row(f"{mode.name}: served by", f"{_served(engine)}, {held >> 20} MiB of weights")
    yield from _said(mode.name, taken, works, weights, flops, bounds)


def _table_bytes(model: LlamaForCausalLM) -> int:
    """Of an embedding that is no head, of which a step reads a few rows."""
    table, head = (module.get_parameter("weight") for module in (model.model.embed_tokens, model.lm_head))
    return 0 if table is head else table.nbytes


def _said(
    side: str, taken: dict[str, float], works: dict[str, Workload], weights: int, flops: int, bounds: Roofline
) -> Iterator[Row]:
    """Times as what bounds them: weights read in a second, operations in a second, tokens in a second."""
    for place, (name, work) in enumerate(works.items()):
        if name not in taken:
            continue
        seconds, rate = taken[name], work.generated / taken[name]
        value = f"{seconds * 1e3:.1f} ms, {rate:.1f} tokens/s"
        data: dict[str, object] = {"seconds": seconds, "tokens_per_s": rate}
        if place == 0:
            data["share"] = weights * rate / bounds.bytes_per_s
            value += f", weights at {data['share']:.0%} of the copy bandwidth"
        if place == 1:
            data["share"] = flops / seconds / bounds.flops_per_s
            value += f", {data['share']:.0%} of the matrix rate"
        yield Row(f"{side}: {name}", value, data=data)


def _times(run: Run, works: dict[str, Workload], rounds: int) -> dict[str, float]:
    """Median seconds of each workload, after a warm-up."""
    found = {}
    for name, work in works.items():
        run(work)
        found[name] = statistics.median(run(work) for _ in range(rounds))
    return found


class _Engine:
    """An engine over a model in memory, which is restored when it is left, where it can be."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        mode: Mode,
        device: torch.device,
        *,
        num_requests: int,
        is_restored: bool = True,
    ) -> None:
        self._is_restored = is_restored
        # A configuration that never was in a file names no type, and "auto" would then compute in fp32.
        dtype = next(name for name, each in TORCH_DTYPES.items() if each is model.dtype)
        limits = {"scheduler": {"max_num_seqs": num_requests}, "max_model_len": 4096}
        settings = {"dtype": dtype, **limits, **mode.settings}
        self._model = model
        self._shardformer = InferenceShardformer(
            ShardConfig(device=device.type),
            InferenceConfig.model_validate(settings),
            sources=ConfigSources(environ={}),
        )

    def __enter__(self):  # noqa: ANN204 - the engine's own type
        self._shardformer.optimize(self._model)
        return self._shardformer.attach(self._model)

    def __exit__(self, *exc_info: object) -> None:
        if self._is_restored:
            self._shardformer.unshard(self._model)
        self._shardformer.close()


def _served(engine) -> str:  # noqa: ANN001 - as above
    """What computes, in which type, and up to which batch size steps are captured."""
    names = ("dtype", "attention.backend", "cache.block_size", "graphs", "kernels.linear")
    decided = {name: engine.config[f"inference.{name}"] for name in names}
    return ", ".join(f"{name} {value}" for name, value in decided.items())


def _ours(engine) -> Run:  # noqa: ANN001 - as above
    def run(work: Workload) -> float:
        sampling = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in work.max_new_tokens]
        engine.reset_prefix_cache()  # else a round would find what the one before has computed
        start = time.perf_counter()
        outputs = engine.generate(work.prompts, sampling)
        seconds = time.perf_counter() - start
        _check(sum(len(output.token_ids) for output in outputs), work)
        return seconds

    return run


def hf_greedy(model: LlamaForCausalLM, prompt: list[int], new_tokens: int, device: torch.device) -> list[int]:
    """What Hugging Face continues one prompt with, greedily."""
    ids = torch.tensor([prompt], device=device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def _hf_generate(model: LlamaForCausalLM, device: torch.device) -> Run:
    def run(work: Workload) -> float:
        start = time.perf_counter()
        for prompt, count in zip(work.prompts, work.max_new_tokens, strict=True):
            hf_greedy(model, prompt, count, device)
        return time.perf_counter() - start

    return run


def _hf_continuous(model: LlamaForCausalLM, count: int) -> Run:
    """Hugging Face's paged continuous batching."""

    def run(work: Workload) -> float:
        seconds, generated = run_continuous(model, work, num_blocks=count * 16)
        _check(generated, work)
        return seconds

    return run


def _check(generated: int, work: Workload) -> None:
    if generated != work.generated:
        raise RuntimeError(f"{generated} tokens were generated instead of {work.generated}: nothing to compare")
