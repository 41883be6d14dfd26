"""Ranks of a tuning test: one backend is fast on the first rank and slow on the second; prints what each rank chose."""

from __future__ import annotations

import json
import os

from tuning_backends import BUCKETS, CLOCK, registry_of, scripted

from inference_shardformer import ConfigSources, InferenceConfig, ShardConfig
from inference_shardformer.config.loader import gather
from inference_shardformer.tuning.buckets import PHASES
from inference_shardformer.tuning.session import compare_backends


def priced(seconds: float) -> dict[str, list[float]]:
    return {phase: [seconds] for phase in PHASES}


def main() -> None:
    is_second = os.environ["RANK"] == "1"
    even = scripted("even", seconds=priced(2.0))
    uneven = scripted("uneven", seconds=priced(5.0 if is_second else 1.0))
    wrong = scripted("wrong", seconds=priced(0.125), error=0.5 if is_second else 0.0)
    layers = gather(ConfigSources(environ={}), ShardConfig(device="cpu"), InferenceConfig(dtype="fp32"))
    registry = registry_of(even, uneven, wrong, alone=True)
    (found,) = compare_backends(layers, None, BUCKETS, rounds=2, registry=registry, clock=CLOCK)
    print(json.dumps(found.to_json()), flush=True)


if __name__ == "__main__":
    main()
