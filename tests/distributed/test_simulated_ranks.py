"""Simulated ranks equal real gloo ranks to the last bit: sums, and the logits of every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from simulated_parity_ranks import RUNS, configs, logits, sums
from tiny_models import save_tiny_model

from inference_shardformer import simulate
from inference_shardformer.distributed.simulated.reduction import reduce_sum
from inference_shardformer.simulation import SimulatedRank


@pytest.mark.parametrize("tp_size", [2, 4])
def test_simulated_ranks_equal_real_ones_bit_for_bit(tmp_path: Path, tp_size: int) -> None:
    save_tiny_model("gqa_fewer_kv_heads_than_ranks", tmp_path)
    real = run_ranks("simulated_parity_ranks.py", str(tmp_path), nproc=tp_size)
    assert [rank.returncode for rank in real] == [0] * tp_size, real[0].stderr[-3000:]

    def work(rank: SimulatedRank) -> dict[str, list[str]]:
        found = {"sums": sums(rank.process_group.join(None)[0])}
        for run in RUNS:
            with rank.shardformer(*configs(*run)) as shardformer:
                found[" ".join(run)] = logits(shardformer, tmp_path)
        return found

    assert simulate(tp_size, work) == [rank.said for rank in real]


def test_the_two_orders_differ_where_rounding_does() -> None:
    parts = [torch.randn(4096, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    in_turn, ring = reduce_sum(parts, "shm"), reduce_sum(parts, "gloo")
    assert torch.equal(in_turn, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    assert not torch.equal(in_turn, ring)
    torch.testing.assert_close(in_turn, ring)
    half = [part.bfloat16() for part in parts]
    assert torch.equal(reduce_sum(half, "shm"), reduce_sum([part.float() for part in half], "shm").bfloat16())
