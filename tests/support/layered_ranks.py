"""Rank program: generates with a model whose odd layers have a window, explains, mixes backends, and switches.

Usage: layered_ranks.py PROMPTS.json, with [[ids], ...]; one line of JSON per rank.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from switchable_backends import TransposedAttention
from windowed_models import WindowedLlamaPolicy, plain_backends, windowed_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention import selector
from inference_shardformer.attention.base import AttentionSpec, Feature
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.survey import BACKENDS
from inference_shardformer.engine.backend_switch import BackendChange
from inference_shardformer.errors import InferenceShardformerError

INFERENCE = {
    "dtype": "fp32",
    "cache": {"block_size": 4, "num_blocks": 40},
    "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 16},
}
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SWITCHES = {3: "transposed", 6: "failing", 9: "reference"}


class FailingAttention(TransposedAttention):
    """Cannot be had on rank 1, in layers with a window."""

    name = "failing"

    def __init__(self, spec: AttentionSpec) -> None:
        if dist.get_rank() == 1 and spec.sliding_window is not None:
            raise OSError("no such kernel")
        super().__init__(spec)


def run(prompts: list[list[int]], switches: dict[int, str]) -> dict[str, object]:
    """Everything one engine has to say; before each step of `switches` another backend is asked for."""
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(INFERENCE)) as shardformer:
        model, _ = shardformer.optimize(windowed_model(), WindowedLlamaPolicy())
        engine = shardformer.attach(model)
        first = shardformer.explain().to_json()["attention"]
        for index, prompt in enumerate(prompts):
            engine.add_request(prompt, GREEDY, request_id=str(index))
        tokens: dict[str, list[int]] = {}
        changes: list[BackendChange] = []
        step = 0
        while engine.has_unfinished():
            if step in switches:
                changes.append(engine.switch_backend(switches[step]))
            tokens.update({output.request_id: list(output.token_ids) for output in engine.step()})
            step += 1
        return {
            "first": first,
            "last": shardformer.explain().to_json()["attention"],
            "bound": [layer.self_attn.backend.name for layer in model.model.layers],
            "tokens": [tokens[str(index)] for index in range(len(prompts))],
            "errors": [None if change.error is None else str(change.error) for change in changes],
        }


def without_windows() -> None:
    """From now on sdpa has no windows; the next candidate keeps its cache in another layout."""
    plain = SdpaAttention.capabilities
    SdpaAttention.capabilities = replace(plain, features=plain.features - {Feature.SLIDING_WINDOW})
    selector._PREFERRED = {"cpu": ("sdpa", "transposed")}
    BACKENDS.register("transposed", TransposedAttention)
    BACKENDS.register("failing", FailingAttention)


def named(prompts: list[list[int]]) -> str:
    """What is said to a backend that serves whole layers alone."""
    inference = InferenceConfig.model_validate({**INFERENCE, "attention": {"backend": "sdpa"}})
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        try:
            shardformer.optimize(windowed_model(), WindowedLlamaPolicy())
        except InferenceShardformerError as error:
            return str(error)
    return ""


def main(prompts_file: Path) -> None:
    """Alike first, then several backends, with switches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = json.loads(prompts_file.read_text())
    BACKENDS._entries = plain_backends()
    said: dict[str, object] = {"alike": run(prompts, {})}
    without_windows()
    said |= {"mixed": run(prompts, SWITCHES), "named": named(prompts)}
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
