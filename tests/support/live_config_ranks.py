"""Rank program: requests run while rank 0 changes the live configuration from another thread; says what it saw.

Usage: live_config_ranks.py PROMPTS.json, with [[ids], ...]; one line of JSON per rank.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.engine.outputs import StepStats

SEQS = "inference.scheduler.max_num_seqs"
TOKENS = "inference.scheduler.max_num_batched_tokens"
LENGTH = "inference.sampling.max_new_tokens"
INFERENCE = {"dtype": "fp32", "cache": {"block_size": 4, "num_blocks": 60}}
SAMPLING = [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"temperature": 0.8, "seed": 7}]
MAX_NEW_TOKENS = 12


def sampling_of(index: int) -> SamplingParams:
    """How the request of this index chooses."""
    return SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True, **SAMPLING[index % len(SAMPLING)])


def change_limits(engine: InferenceEngine, done: threading.Event, seed: int) -> None:
    """Update two limits at random moments until told to end."""
    rng = random.Random(seed)
    while not done.wait(rng.random() / 200):
        engine.update_config({SEQS: rng.randint(1, 12), TOKENS: rng.randint(4, 64)}, source="operator")


def run_with_updates(engine: InferenceEngine, prompts: list[list[int]]) -> dict[str, object]:
    """All requests at once while limits change; what every step saw, by its number."""
    steps: list[list[int]] = []
    done = threading.Event()

    def on_step(stats: StepStats) -> None:
        steps.append([len(steps), stats.config_epoch, stats.num_running, stats.num_prefill_tokens])

    updater = threading.Thread(target=change_limits, args=(engine, done, 1))
    if dist.get_rank() == 0:
        updater.start()
    params = [sampling_of(index) for index in range(len(prompts))]
    outputs = engine.generate(prompts, params, on_step=on_step)
    if dist.get_rank() == 0:
        done.set()
        updater.join()
        engine.update_config({SEQS: 12, TOKENS: 64})  # whatever came last: two requests run at once from here on
    engine.step()  # what came after the last step
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "steps": steps,
        "limits": [engine.config[SEQS], engine.config[TOKENS], engine.config.current.epoch],
    }


def run_with_veto(engine: InferenceEngine) -> dict[str, object]:
    """An update that the last rank refuses, then one that all accept, while a request runs."""
    heard: list[list[object]] = []
    end = engine.config.subscribe(
        "sampling.*",
        lambda changes: heard.append(["told", changes[0].new]),
        on_rollback=lambda changes: heard.append(["back", changes[0].new]),
    )

    def refuse_seven(changes: tuple) -> None:
        if changes[0].new == 7:
            raise ConfigVeto("seven is too many", remedy="ask for five")

    if dist.get_rank() == dist.get_world_size() - 1:
        engine.config.subscribe("sampling.*", refuse_seven)
    before = engine.config.current.epoch
    engine.add_request([5, 6, 7], SamplingParams(ignore_eos=True, max_new_tokens=8), request_id="live")
    errors = []
    outputs = []
    for length in (7, 5):
        try:
            errors.append(engine.update_config({LENGTH: length}) if dist.get_rank() == 0 else None)
        except ConfigVeto as error:  # with one rank it is refused at once
            errors.append(SimpleError(error))
        outputs += engine.step()
    engine.add_request([5, 6, 7], SamplingParams(ignore_eos=True), request_id="after")
    for _ in range(8):
        outputs += engine.step()
    end()
    return {
        "refused": [str(update.error) for update in errors if update is not None and update.error],
        "heard": heard,
        "epochs": [[output.request_id, output.config_epoch - before, len(output.token_ids)] for output in outputs],
    }


class SimpleError:
    """An update that was refused by the call itself."""

    def __init__(self, error: ConfigVeto) -> None:
        self.error = error


def main(prompts_file: Path) -> None:
    """Serial first, then with updates, then with a veto."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    prompts = json.loads(prompts_file.read_text())
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(INFERENCE)) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"))
        engine = shardformer.attach(model)
        serial = [engine.generate([prompt], sampling_of(index))[0] for index, prompt in enumerate(prompts)]
        said = {
            "serial": [list(output.token_ids) for output in serial],
            "updated": run_with_updates(engine, prompts),
            "veto": run_with_veto(engine),
        }
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
