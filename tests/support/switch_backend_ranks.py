"""Rank program: requests run while the attention backend is exchanged, and while exchanges fail; says what it saw.

Usage: switch_backend_ranks.py PROMPTS.json, with [[ids], ...]; one line of JSON per rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from switchable_backends import SERVING, TransposedAttention, switchable_registry
from tiny_models import tiny_model

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.engine.backend_switch import BackendChange
from inference_shardformer.errors import InferenceShardformerError

INFERENCE = {
    "dtype": "fp32",
    "attention": {"backend": "sdpa"},
    "cache": {"block_size": 4, "num_blocks": 26},
    "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 16},
}
GREEDY = SamplingParams(max_new_tokens=14, ignore_eos=True)


class TransposedOnRankZero(TransposedAttention):
    """Fails on rank 1 in the phase that `fails_in` names."""

    name = "one_sided"
    fails_in = ""

    def __init__(self, spec: AttentionSpec) -> None:
        if dist.get_rank() == 1 and self.fails_in == "prepare":
            raise OSError("rank 1 lacks a kernel")
        super().__init__(spec)


class FragileBinding:
    """Takes the place of the runner's `bind` on rank 1, and fails when told to."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._runner = engine._runner
        self._bind = engine._runner.bind
        self.is_broken = False
        self._runner.bind = self

    def __call__(self, *args: object) -> None:
        broken, self.is_broken = self.is_broken, False
        if broken:
            raise OSError("rank 1 lost its device")
        self._bind(*args)


def told(change: BackendChange | None) -> list[str] | None:
    """The type and the text of what a switch ended with."""
    return None if change is None or change.error is None else [type(change.error).__name__, str(change.error)]


def run(engine: InferenceEngine, prompts: list[list[int]], switches: dict[int, str], *, by_all: bool) -> dict:
    """All requests at once; before each step of `switches` that backend is asked for, by all ranks or by rank 0."""
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, GREEDY, request_id=str(index))
    tokens: dict[str, list[int]] = {}
    used: list[str] = []
    changes: list[BackendChange] = []
    number = 0
    while engine.has_unfinished():
        if number in switches and (by_all or dist.get_rank() == 0):
            changes.append(engine.switch_backend(switches[number]))
            if number % 2:  # an update of the configuration that is asked for behind it
                engine.update_config({"scheduler.max_num_seqs": 3 + number % 4})
        tokens.update({output.request_id: list(output.token_ids) for output in engine.step()})
        used.append(f"{'+'.join(engine._runner.attention.names)} {engine.config['inference.attention.backend']}")
        number += 1
    return {
        "tokens": [tokens[str(index)] for index in range(len(prompts))],
        "used": used,
        "epoch": engine.config.current.epoch,
        "limit": engine.config["scheduler.max_num_seqs"],
        "errors": [told(change) for change in changes],
        "done": [change.is_done for change in changes],
    }


def refused_by_rank_one(engine: InferenceEngine) -> list[str] | None:
    """A switch that rank 1 alone asks for."""
    change = engine.switch_backend("reference") if dist.get_rank() == 1 else None
    engine.step()
    return told(change)


def main(prompts_file: Path) -> None:
    """Unswitched first, then switches, then failures in either phase."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = json.loads(prompts_file.read_text())
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(INFERENCE)) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        engine = shardformer.attach(model)
        registry = switchable_registry()
        registry.register(TransposedOnRankZero.name, TransposedOnRankZero)
        shardformer._switch._registry = registry
        said = {"unswitched": run(engine, prompts, {}, by_all=True)}
        names = {step: SERVING[(step // 3) % 3] for step in range(2, 40, 3)}
        said["by_all"] = run(engine, prompts, names, by_all=True)
        said["by_rank_0"] = run(engine, prompts, names, by_all=False)
        run(engine, prompts, {0: "sdpa"}, by_all=True)
        TransposedOnRankZero.fails_in = "prepare"
        said["prepare"] = run(engine, prompts, {4: "one_sided", 8: "wrong"}, by_all=True)
        TransposedOnRankZero.fails_in = ""
        if dist.get_rank() == 1:
            FragileBinding(engine).is_broken = True
        said["bind"] = run(engine, prompts, {4: "one_sided"}, by_all=True)
        said["alone"] = refused_by_rank_one(engine)
        try:
            engine.switch_backend("narrow")
        except InferenceShardformerError as error:
            said["refused"] = str(error)
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
