"""Measures backends on buckets: each must be right first, then all take turns, and medians count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, KVLayout
from inference_shardformer.attention.proof import TOLERANCES, Trial, expected_output, make_trial, run_trial
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.tuning.buckets import Bucket
from inference_shardformer.tuning.measurement import Measurement

Clock = Callable[[], float]
Contender = AttentionBackend | BackendUnavailableError  # the error stands for one that could not be constructed
Contenders = Mapping[str, Contender]

LAYERS_PER_PLAN = 32  # every layer of a model shares one plan; so many has a LLaMA of eight billion parameters


def make_clock(device: torch.device) -> Clock:
    """Seconds, read when `device` has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def measure(
    contenders: Contenders,
    spec: AttentionSpec,
    buckets: Sequence[Bucket],
    *,
    rounds: int,
    clock: Clock,
) -> tuple[Measurement, ...]:
    """One row for each bucket and contender."""
    rows: list[Measurement] = []
    with torch.inference_mode():
        for bucket in buckets:
            rows += _measure_bucket(contenders, spec, bucket, rounds, clock)
    return tuple(rows)


def _measure_bucket(
    contenders: Contenders, spec: AttentionSpec, bucket: Bucket, rounds: int, clock: Clock
) -> list[Measurement]:
    gate = _Gate(spec, bucket)
    rows = {name: gate.admit(name, contender) for name, contender in contenders.items()}
    able = [name for name, row in rows.items() if not row.problem]
    samples: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(rounds):
        start = turn % len(able) if able else 0
        for name in able[start:] + able[:start]:  # nobody always runs behind the same rival
            seconds = gate.sample(name, contenders[name], clock)
            if seconds is not None:
                samples[name].append(seconds)
    for name in able:  # right at first is not right for good
        rows[name] = gate.dismiss(name, rows[name], statistics.median(samples[name]) if samples[name] else None)
    return list(rows.values())


class _Gate:
    """What is right on one bucket, and which backend keeps to it. Every backend has tensors of its own to write to."""

    def __init__(self, spec: AttentionSpec, bucket: Bucket) -> None:
        self._spec = spec
        self._bucket = bucket
        self._expected: dict[KVLayout, torch.Tensor] = {}
        self._trials: dict[str, Trial] = {}
        self._outs: dict[str, torch.Tensor | None] = {}
        self._failures: dict[str, str] = {}

    def admit(self, name: str, contender: Contender) -> Measurement:
        """The row of a backend after its first step, which also warms it up."""
        row = Measurement(*self._bucket, name)
        if isinstance(contender, BackendUnavailableError):
            return replace(row, problem=contender.message)
        layout = contender.capabilities.kv_layout
        trial = self._trials[name] = make_trial(self._spec, self._bucket.sequences(), layout)
        if layout not in self._expected:  # another layout holds other noise
            self._expected[layout] = expected_output(trial, self._spec)
        self._step(name, lambda: run_trial(contender, trial))
        return self._judged(row)

    def sample(self, name: str, contender: Contender, clock: Clock) -> float | None:
        """Seconds of one layer's step with its share of the plan; `None` if the backend failed or has failed before."""
        if isinstance(contender, BackendUnavailableError) or name in self._failures:
            return None
        trial = self._trials[name]
        layer = trial.kv_cache.layer(0)
        times: list[float] = []

        def timed() -> torch.Tensor:
            times.append(clock())
            meta = contender.plan(trial.batch, trial.kv_cache)
            times.append(clock())
            contender.write(trial.k, trial.v, layer, meta)
            if trial.sinks is None:
                out = contender.attend(trial.q, layer, meta)
            else:
                out = contender.attend_with_sinks(trial.q, layer, meta, trial.sinks)
            times.append(clock())
            return out

        self._step(name, timed)
        if name in self._failures:
            return None
        began, planned, ended = times
        return (planned - began) / LAYERS_PER_PLAN + ended - planned

    def dismiss(self, name: str, row: Measurement, seconds: float | None) -> Measurement:
        """The final row: the median, unless the last step was wrong."""
        judged = self._judged(row)
        self._trials.pop(name, None)
        return judged if judged.problem else replace(judged, seconds=seconds)

    def _step(self, name: str, run: Callable[[], torch.Tensor]) -> None:
        try:
            self._outs[name] = run()
        except Exception as exc:  # noqa: BLE001 - a backend's library may raise anything; it is out, the others go on
            self._failures[name] = f"it raised {type(exc).__name__}: {exc}"
            self._outs[name] = None

    def _judged(self, row: Measurement) -> Measurement:
        """The row with the error and the problem of the backend's last step."""
        out = self._outs[row.backend]
        if out is None:
            return replace(row, problem=self._failures[row.backend])
        expected = self._expected[self._trials[row.backend].kv_cache.layouts[0]]
        if out.shape != expected.shape or out.dtype != expected.dtype:
            return replace(row, problem=f"it returned {out.dtype} {tuple(out.shape)}")
        error = (out.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max().item()
        worst = max(error, row.max_error or 0.0)
        allowed = TOLERANCES[self._spec.dtype]
        is_right = worst <= allowed
        problem = "" if is_right else f"it differs from the reference by up to {worst:.3g}, {allowed:g} is allowed"
        return replace(row, max_error=worst, problem=problem)
