"""A side of a benchmark: our engine over a checkpoint, on as many ranks as were launched. See `benchmarking.sides`."""

from __future__ import annotations

import argparse
import time

import torch
from benchmarking.serving import serve
from benchmarking.workloads import Workload

from inference_shardformer import InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import RankFailure


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="PATH=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shardformer = InferenceShardformer(
        ShardConfig(device="cpu", threads_per_rank=args.threads), sources=ConfigSources(sets=tuple(args.sets))
    )
    engine = shardformer.attach(shardformer.from_pretrained(args.folder))

    def run(work: Workload) -> tuple[float, int]:
        sampling = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.max_new_tokens]
        engine.reset_prefix_cache()  # else a round would find what the one before has computed
        start = time.perf_counter()
        outputs = engine.generate(work.prompts, sampling)
        return time.perf_counter() - start, sum(len(output.token_ids) for output in outputs)

    if shardformer.group.rank == 0:
        serve(run)
        return
    try:
        while True:
            engine.step()
    except RankFailure:  # the first rank has ended
        return


if __name__ == "__main__":
    main()
