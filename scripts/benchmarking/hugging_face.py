"""Hugging Face's continuous batching, as a side of comparisons."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarking.workloads import Workload

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def run_continuous(model: LlamaForCausalLM, work: Workload, *, num_blocks: int) -> tuple[float, int]:
    """Seconds and generated tokens of a workload, every request with its own length, over 32-token pages."""
    from transformers import ContinuousBatchingConfig, GenerationConfig  # newer than the oldest transformers

    config = ContinuousBatchingConfig(page_size=32, num_blocks=num_blocks, max_batch_tokens=2048)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        start = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(work.prompts, work.max_new_tokens, strict=True)):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
        results: dict[str, int] = {}
        while len(results) < len(work.prompts):
            result = manager.get_result(timeout=60)
            if result is not None and result.is_finished():
                results[result.request_id] = len(result.generated_tokens)
        return time.perf_counter() - start, sum(results.values())
