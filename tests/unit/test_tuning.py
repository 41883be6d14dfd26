"""Measuring and choosing: the gate, the rounds, the medians, the choice against an oracle, the slowest rank."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning_backends import BUCKETS, CLOCK, SPEC, Scripted, scripted

from inference_shardformer.attention.base import KVLayout
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.tuning.buckets import Bucket, grid, served
from inference_shardformer.tuning.choice import PHASE_WEIGHTS, choose, praise, standings
from inference_shardformer.tuning.measure import LAYERS_PER_PLAN, make_clock, measure
from inference_shardformer.tuning.measurement import Measurement, rows_from_bytes, rows_to_bytes, slowest_of

PREFILL, DECODE, MIXED = BUCKETS


def run(*backends: type[Scripted], buckets=BUCKETS, rounds: int = 3) -> dict[tuple[str, Bucket], Measurement]:
    contenders = {backend.name: backend(SPEC) for backend in backends}
    rows = measure(contenders, SPEC, buckets, rounds=rounds, clock=CLOCK)
    return {(row.backend, row.bucket): row for row in rows}


def row(backend: str, bucket: Bucket, seconds: float | None = 1.0, problem: str = "") -> Measurement:
    return Measurement(*bucket, backend, seconds=seconds, max_error=0.0, problem=problem)


class TestBuckets:
    def test_the_sequences_of_each_phase(self):
        assert Bucket("prefill", 2, 6).sequences() == [(6, 6), (6, 6)]
        assert Bucket("decode", 2, 6).sequences() == [(1, 6), (1, 6)]
        assert Bucket("mixed", 2, 6).sequences() == [(1, 6), (1, 6), (3, 6)]
        assert [Bucket(phase, 2, 6).num_tokens for phase in ("prefill", "decode", "mixed")] == [12, 2, 5]

    def test_the_grid_has_every_combination_once(self):
        assert len(grid(["decode", "prefill"], [1, 2, 1], [4, 8])) == 8

    def test_a_spec_that_does_not_mix_has_no_mixed_buckets(self):
        assert served(BUCKETS, SPEC) == BUCKETS
        assert served(BUCKETS, replace(SPEC, features=frozenset())) == (PREFILL, DECODE)


class TestMeasure:
    def test_the_median_counts_and_the_first_step_does_not(self):
        prices = {"decode": [50.0, 3.0, 100.0, 2.0, 4.0, 5.0]}  # the first is the gate's
        rows = run(scripted("a", seconds=prices), buckets=(DECODE,), rounds=5)
        assert rows["a", DECODE].seconds == 4.0
        assert rows["a", DECODE].tokens_per_second == DECODE.num_tokens / 4.0
        assert (rows["a", DECODE].max_error, rows["a", DECODE].verdict) == (0.0, "ok")

    def test_a_plan_is_shared_by_the_layers(self):
        rows = run(scripted("a", plan_seconds=float(LAYERS_PER_PLAN)), buckets=(DECODE,))
        assert rows["a", DECODE].seconds == 2.0

    def test_backends_take_turns_and_nobody_is_always_first(self):
        order: list[str] = []

        class Noted(Scripted):
            def attend(self, q, cache, meta):
                order.append(self.name)
                return super().attend(q, cache, meta)

        contenders = {name: type(name, (Noted,), {"name": name})(SPEC) for name in "abc"}
        measure(contenders, SPEC, (DECODE,), rounds=3, clock=CLOCK)
        assert "".join(order) == "abc" + "abc" + "bca" + "cab"

    @pytest.mark.parametrize("wrong_from", [0, 3])
    def test_wrong_but_fast_never_wins(self, wrong_from):
        fast = scripted("fast", seconds={phase: [1e-6] for phase in PHASE_WEIGHTS}, error=0.5, wrong_from=wrong_from)
        rows = run(fast, scripted("slow"), buckets=(DECODE,))
        bad = rows["fast", DECODE]
        assert (bad.verdict, bad.seconds, bad.max_error) == ("disqualified", None, pytest.approx(0.5, rel=1e-5))
        assert "by up to 0.5, 0.002 is allowed" in bad.problem
        assert choose(list(rows.values())) == "slow"

    def test_an_error_within_the_tolerance_is_let_pass(self):
        assert run(scripted("a", error=1.9e-3))["a", DECODE].is_valid
        assert not run(scripted("a", error=2.1e-3))["a", DECODE].is_valid

    def test_nan_and_another_shape_are_wrong(self):
        class Short(Scripted):
            def attend(self, q, cache, meta):
                return super().attend(q, cache, meta)[:1]

        rows = run(scripted("nan", error=math.nan), type("short", (Short,), {"name": "short"}), buckets=(DECODE,))
        assert rows["nan", DECODE].max_error == math.inf
        assert "returned torch.float32 (1, 4, 8)" in rows["short", DECODE].problem

    @pytest.mark.parametrize("raises_at", [0, 2])
    def test_one_that_raises_is_out_and_the_others_go_on(self, raises_at):
        rows = run(scripted("a", raises_at=raises_at), scripted("b"), buckets=(DECODE,))
        assert rows["a", DECODE].problem == "it raised OSError: the device is gone"
        assert rows["a", DECODE].seconds is None
        assert rows["b", DECODE].is_valid

    def test_one_that_could_not_be_constructed_has_rows_that_say_why(self):
        rows = measure({"a": BackendUnavailableError("no library")}, SPEC, BUCKETS, rounds=1, clock=CLOCK)
        assert [row.problem for row in rows] == ["no library"] * 3

    def test_one_that_spoils_the_cache_spoils_its_own(self):
        class Spoiler(Scripted):
            def attend(self, q, cache, meta):
                cache.keys.fill_(7.0)
                return super().attend(q, cache, meta)

        rows = run(type("spoiler", (Spoiler,), {"name": "spoiler"}), scripted("good"))
        assert not any(rows["spoiler", bucket].is_valid for bucket in (PREFILL, MIXED))
        assert all(rows["good", bucket].is_valid for bucket in BUCKETS)

    def test_a_layout_of_its_own_is_measured_in_it(self):
        class Transposed(Scripted):
            capabilities = replace(ReferenceAttention.capabilities, kv_layout=KVLayout.HND)

            def write(self, k, v, cache, meta):
                block, offset = meta.batch.slot_mapping // SPEC.block_size, meta.batch.slot_mapping % SPEC.block_size
                cache.keys[block, :, offset], cache.values[block, :, offset] = k, v

            def attend(self, q, cache, meta):
                plain = LayerKVCache(cache.keys.transpose(1, 2), cache.values.transpose(1, 2))
                return super().attend(q, plain, meta)

        rows = run(type("hnd", (Transposed,), {"name": "hnd"}), scripted("nhd"))
        assert [row.problem for row in rows.values()] == [""] * 6

    def test_real_backends_with_a_real_clock(self):
        spec = replace(SPEC, dtype=torch.bfloat16)
        contenders = {"sdpa": SdpaAttention(spec), "reference": ReferenceAttention(spec)}
        rows = measure(contenders, spec, BUCKETS, rounds=2, clock=make_clock(spec.device))
        assert [row.problem for row in rows] == [""] * 6
        assert all(row.seconds > 0 for row in rows)

    def test_sinks_are_measured_too(self):
        spec = replace(SPEC, sinks=True)
        rows = measure({"reference": ReferenceAttention(spec)}, spec, BUCKETS, rounds=1, clock=CLOCK)
        assert [row.problem for row in rows] == [""] * 3


TIMES = st.lists(st.lists(st.sampled_from([1e-4, 3e-4, 1e-3, 0.5]), min_size=3, max_size=3), min_size=1, max_size=5)


class TestChoice:
    @given(TIMES, st.sets(st.tuples(st.integers(0, 4), st.integers(0, 2))), st.randoms())
    def test_the_choice_is_the_oracles_in_any_order_of_rows(self, times, wrong, shuffler: random.Random):
        rows = [
            row(f"b{number}", bucket, times[number][place], "wrong" if (number, place) in wrong else "")
            for number in range(len(times))
            for place, bucket in enumerate(BUCKETS)
        ]
        right = [n for n in range(len(times)) if not any((n, place) in wrong for place in range(3))]
        # prefill, decode, mixed weigh 1, 2, 1: the product of times to these powers, rounded for equal ones
        scores = {n: round(math.log(times[n][0] * times[n][1] ** 2 * times[n][2]), 9) for n in right}
        shuffled = list(rows)
        shuffler.shuffle(shuffled)
        if not right:
            with pytest.raises(BackendUnavailableError, match="no attention backend is right"):
                choose(rows)
            return
        best = [n for n in right if scores[n] == min(scores.values())]
        assert int(choose(rows)[1:]) in best
        assert choose(shuffled) == choose(rows)

    def test_equal_ones_are_decided_by_name(self):
        rows = [row(name, bucket) for name in ("zeta", "alpha", "mid") for bucket in BUCKETS]
        assert choose(rows) == choose(rows[::-1]) == "alpha"

    def test_many_buckets_of_a_phase_do_not_outweigh_another(self):
        decodes = [Bucket("decode", 1, 8)]
        prefills = [Bucket("prefill", 1, length) for length in range(1, 6)]
        rows = [row("decoder", bucket, 1.0) for bucket in decodes] + [row("decoder", b, 1.5) for b in prefills]
        rows += [row("filler", bucket, 1.5) for bucket in decodes] + [row("filler", b, 1.0) for b in prefills]
        assert choose(rows) == "decoder"

    def test_one_wrong_bucket_is_enough_and_a_missing_one_too(self):
        rows = [row("a", PREFILL, 0.1), row("a", DECODE, 0.1, "wrong"), row("b", PREFILL), row("b", DECODE)]
        assert choose(rows) == "b"
        assert choose([rows[0], *rows[2:]]) == "b"

    def test_a_time_of_zero_is_a_tick(self):
        assert choose([row("a", DECODE, 1.0), row("b", DECODE, 0.0)]) == "b"

    def test_the_error_says_what_is_wrong_with_each(self):
        with pytest.raises(BackendUnavailableError) as caught:
            choose([row("a", DECODE, 0.1, "it is off"), row("b", DECODE, None, "it raised")])
        assert "a, decode 2 x 8: it is off" in caught.value.message
        assert "b, decode 2 x 8: it raised" in caught.value.message
        assert standings([]) == ()

    def test_praise(self):
        rows = [row("a", DECODE, 1.0), row("b", DECODE, 3.0), row("c", DECODE, 0.1, "wrong")]
        assert praise(rows, "a") == "fastest of 3, 3 x faster than b"
        assert praise([rows[0], rows[2]], "a") == "the only one of 2 that is right"
        assert praise(rows[:1], "a") == "the only one that can serve"


class TestRanks:
    def test_the_slowest_rank_decides(self):
        first = [row("even", DECODE, 2.0), row("uneven", DECODE, 1.0)]
        second = [row("even", DECODE, 2.0), row("uneven", DECODE, 5.0)]
        assert (choose(first), choose(second)) == ("uneven", "even")
        together = slowest_of([first, second])
        assert {each.backend: each.seconds for each in together} == {"even": 2.0, "uneven": 5.0}
        assert choose(together) == "even"

    def test_wrong_on_one_rank_is_wrong(self):
        bad = replace(row("a", DECODE, None, "it is off"), max_error=0.7)
        (joined,) = slowest_of([[row("a", DECODE)], [bad]])
        assert (joined.problem, joined.seconds, joined.max_error) == ("rank 1: it is off", None, 0.7)

    def test_absent_on_one_rank_is_disqualified(self):
        joined = slowest_of([[row("a", DECODE)], [row("a", DECODE), row("b", DECODE, 0.1)]])
        assert [each.problem for each in joined] == ["", "rank 0: cannot serve there"]

    def test_one_rank_is_itself(self):
        rows = [row("a", DECODE, None, "it is off")]
        assert slowest_of([rows]) == tuple(rows)

    def test_rows_survive_the_journey(self):
        rows = (row("a", DECODE, 0.1), row("b", MIXED, None, "it is off"))
        assert rows_from_bytes(rows_to_bytes(rows)) == rows
        infinite = replace(rows[1], max_error=math.inf)
        assert rows_from_bytes(rows_to_bytes([infinite]))[0].max_error is None
        assert infinite.to_object()["max_error"] is None

    @pytest.mark.parametrize("data", [b"{", b"[1]", b'[{"phase": "decode"}]', b'[{"phase": "rest"}]'])
    def test_malformed_rows_are_refused(self, data):
        with pytest.raises(ValueError):
            rows_from_bytes(data)
