"""Rank program: a checkpoint is loaded, saved in both ways and unsharded; another's weights are taken in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from reversing import digest
from tiny_models import hf_greedy, tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams
from inference_shardformer.errors import InferenceShardformerError

PROMPT = [3, 14, 15, 9, 2]


def shardformer() -> InferenceShardformer:
    """A shardformer over the ranks of the launcher."""
    return InferenceShardformer(None, InferenceConfig(dtype="fp32"), sources=ConfigSources(environ={}))


def main() -> None:
    """`CASE FOLDER`: FOLDER/original holds the checkpoint of CASE; says what came of it, as one line of JSON."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    said: dict[str, object] = {}
    with shardformer() as mine:
        model = mine.from_pretrained(folder / "original")
        mine.save_pretrained(model, folder / "saved", max_shard_size="30KB")
        mine.save_sharded(model, folder / "parts")
        engine = mine.attach(model)
        engine.update_weights(iter(tiny_model(case, seed=7).state_dict().items()))
        said["tokens"] = list(engine.generate([PROMPT], SamplingParams(max_new_tokens=6))[0].token_ids)
        mine.save_pretrained(model, folder / "renewed")
    with shardformer() as mine:
        model = mine.unshard(mine.load_sharded(folder / "parts"))
        said["digest"] = digest(model.state_dict())
        said["greedy"] = hf_greedy(model, PROMPT, 6)
    model = tiny_model(case)
    with shardformer() as mine:
        try:
            with mine.sharded_model(model) as sharded:
                engine = mine.attach(sharded)
                raise ZeroDivisionError
        except ZeroDivisionError:
            said["after an error"] = digest(model.state_dict())
    with shardformer() as mine:
        model, _ = mine.optimize(tiny_model(case))
        engine = mine.attach(model)
        rank = mine.group.rank
        try:
            engine.update_weights(late_failure(case, fails=rank == 1))
        except InferenceShardformerError as exc:
            said["failure"] = [type(exc).__name__, exc.message]
    print(json.dumps(said), flush=True)


def late_failure(case: str, *, fails: bool):
    """Weights of which the fourth is missing on one rank."""
    for number, item in enumerate(tiny_model(case, seed=7).state_dict().items()):
        if fails and number == 3:
            raise OSError("the trainer has gone")
        yield item


if __name__ == "__main__":
    main()
