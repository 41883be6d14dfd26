"""Another attention backend between two steps: no token changes, a failure changes nothing, nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from switchable_backends import SERVING, switchable_registry
from tiny_models import hf_greedy, ragged_prompts, tiny_model

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.engine.backend_switch import BackendSwitches
from inference_shardformer.engine.events import EventExchange, SwitchBackend, decode_events, encode_events
from inference_shardformer.errors import BackendUnavailableError, CapacityError, ConfigError, StateError
from inference_shardformer.kv_cache import cache as cache_module
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.kv_cache.spec import KVCacheSpec

PATH = "inference.attention.backend"
INFERENCE = {
    "dtype": "fp32",
    "cache": {"block_size": 4, "num_blocks": 26},
    "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 16},
}
NUM_REQUESTS, MAX_NEW_TOKENS = 8, 14
PAIRS = list(itertools.permutations(SERVING, 2))
GREEDY = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True)


class Served(NamedTuple):
    """A running engine and its attention modules."""

    shardformer: InferenceShardformer
    engine: InferenceEngine

    def bound(self) -> set[str]:
        """The names of the backends that modules and runner hold."""
        model, runner = self.shardformer.sharded.model, self.engine._runner
        assert runner is not None
        held = {id(module.backend): module.backend for module in model.modules() if hasattr(module, "backend")}
        assert set(held) == set(map(id, runner.attention.backends))
        assert runner.kv_cache.layouts == runner.attention.kv_layouts
        return {backend.name for backend in held.values()}


def _serve() -> Served:
    torch.set_num_threads(1)
    shardformer = InferenceShardformer(
        ShardConfig(device="cpu"), InferenceConfig.model_validate(INFERENCE), sources=ConfigSources(environ={})
    )
    model, _ = shardformer.optimize(tiny_model("gqa"))
    engine = shardformer.attach(model)
    assert shardformer._switch is not None
    shardformer._switch._registry = switchable_registry()
    return Served(shardformer, engine)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = _serve()
    with served.shardformer:
        yield served


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(NUM_REQUESTS, 160, longest=44)


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> dict[str, list[int]]:
    model = tiny_model("gqa")
    tokens = {str(index): hf_greedy(model, prompt, MAX_NEW_TOKENS) for index, prompt in enumerate(prompts)}
    assert len(set(map(tuple, tokens.values()))) == NUM_REQUESTS
    return tokens


class Seen(NamedTuple):
    tokens: dict[str, list[int]]
    prefilling: int  # switches with a prompt that was computed in part
    preempted: int  # switches with a request that had lost its blocks


def _run(served: Served, prompts: list[list[int]], switches: dict[int, str], rng: random.Random) -> Seen:
    """Requests come in over the first steps; before each step of `switches` that backend takes over."""
    engine = served.engine
    arrivals = sorted((rng.randint(0, 8), index) for index in range(len(prompts)))
    tokens: dict[str, list[int]] = {}
    prefilling = preempted = 0
    step = 0
    while arrivals or engine.has_unfinished():
        while arrivals and arrivals[0][0] <= step:
            index = arrivals.pop(0)[1]
            engine.add_request(prompts[index], GREEDY, request_id=str(index))
        if step in switches:
            scheduler = engine._core.scheduler
            running, waiting = scheduler.running, scheduler.waiting
            prefilling += any(0 < each.num_computed_tokens < each.num_prompt_tokens for each in running)
            preempted += any(each.num_output_tokens for each in waiting)
            assert engine.switch_backend(switches[step]).is_done
            assert served.bound() == {switches[step]}
        tokens.update({output.request_id: list(output.token_ids) for output in engine.step()})
        engine._core.scheduler.check_integrity()
        step += 1
    return Seen(tokens, prefilling, preempted)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_a_switch_at_a_random_step_changes_no_token(served, prompts, expected, first, second):
    for seed in range(3):
        rng = random.Random(f"{first} {second} {seed}")
        served.engine.switch_backend(first)
        seen = _run(served, prompts, {rng.randint(1, 20): second}, rng)
        assert seen.tokens == expected
        assert served.bound() == {second}


def test_switches_at_many_steps_amid_chunks_and_preemption(served, prompts, expected):
    rng = random.Random(5)
    switches = {step: rng.choice(SERVING) for step in range(1, 60)}
    seen = _run(served, prompts, switches, random.Random(2))  # arrivals apart, whatever backends there are
    assert seen.tokens == expected
    assert seen.prefilling > 3
    assert seen.preempted > 3


def test_the_configuration_and_the_explanation_tell(served):
    served.engine.switch_backend("sdpa")
    epoch = served.engine.config.current.epoch
    served.engine.switch_backend("reference")
    snapshot = served.engine.config.current
    assert (snapshot[PATH], snapshot.epoch) == ("reference", epoch + 1)
    origin = str(snapshot.config.decision(PATH).origin)
    assert "switch_backend" in origin
    said = served.shardformer.explain().to_json()
    assert said["attention"]["groups"][0]["chosen"] == "reference"
    (value,) = [each for each in said["values"] if each["path"] == PATH]
    assert (value["value"], value["origin"]) == ("reference", origin)
    served.engine.update_config({"scheduler.max_num_seqs": 5})
    assert served.engine.config[PATH] == "reference"
    served.engine.update_config({"scheduler.max_num_seqs": 6})


def test_a_switch_to_what_serves_already_changes_nothing(served):
    served.engine.switch_backend("sdpa")
    before, epoch = served.engine._runner.attention, served.engine.config.current.epoch
    assert served.engine.switch_backend("sdpa").is_done
    assert served.engine._runner.attention is before
    assert served.engine.config.current.epoch == epoch


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("narrow", "float32"),
        ("wrong", "differs from the reference"),
        ("broken", "no such kernel"),
        ("sdap", "did you mean 'sdpa'"),
        ("auto", "name one of"),
    ],
)
def test_a_refused_backend_leaves_the_old_one_serving(served, prompts, expected, name, said):
    engine = served.engine
    engine.switch_backend("sdpa")
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, GREEDY, request_id=str(index))
    outputs = engine.step() + engine.step()
    before = engine._runner.attention, engine.kv_cache, engine.config.current
    with pytest.raises(BackendUnavailableError) as caught:
        engine.switch_backend(name)
    assert said in str(caught.value)
    assert caught.value.remedy
    assert (engine._runner.attention, engine.kv_cache, engine.config.current) == before
    assert served.bound() == {"sdpa"}
    while engine.has_unfinished():
        outputs += engine.step()
    assert {output.request_id: list(output.token_ids) for output in outputs} == expected


def test_no_room_for_a_second_cache(served, monkeypatch):
    served.engine.switch_backend("sdpa")
    cache, make = served.engine.kv_cache, cache_module._zeros

    def full(shape: tuple[int, ...], *args: object) -> torch.Tensor:
        if shape[:2] == (2, cache.num_blocks):
            raise RuntimeError("out of memory")
        return make(shape, *args)

    monkeypatch.setattr(cache_module, "_zeros", full)
    with pytest.raises(CapacityError, match="out of memory"):
        served.engine.switch_backend("transposed")
    assert served.engine.kv_cache is cache
    assert served.bound() == {"sdpa"}


@pytest.mark.parametrize("kind", [OSError, StateError], ids=["foreign", "ours"])
def test_a_failure_while_binding_is_undone(served, prompts, expected, monkeypatch, kind):
    served.engine.switch_backend("sdpa")
    runner = served.engine._runner
    before = runner.attention, runner.kv_cache, served.engine.config.current
    bind, calls = runner.bind, []

    def fail_once(*args: object) -> None:
        calls.append(served.shardformer._switch.attention.names[0])
        if len(calls) == 1:
            raise kind("the device is gone")
        bind(*args)

    monkeypatch.setattr(runner, "bind", fail_once)
    with pytest.raises((BackendUnavailableError, StateError), match="the device is gone"):
        served.engine.switch_backend("transposed")
    assert calls == ["transposed", "sdpa"]
    assert (runner.attention, runner.kv_cache, served.engine.config.current) == before
    assert served.bound() == {"sdpa"}
    assert _run(served, prompts, {}, random.Random(0)).tokens == expected


def test_a_model_that_hides_its_backend_is_refused(served, monkeypatch):
    served.engine.switch_backend("sdpa")
    monkeypatch.setattr(served.shardformer._switch, "_places", served.shardformer._switch._places[:1])
    with pytest.raises(BackendUnavailableError, match="1 modules hold the attention backend"):
        served.engine.switch_backend("reference")


def test_options_reach_the_new_backend_and_are_validated(served, monkeypatch):
    served.engine.switch_backend("sdpa")
    monkeypatch.setattr(served.shardformer._switch, "_options", {"tunable": {"splits": 0}})
    with pytest.raises(ConfigError, match="options of attention backend 'tunable'"):
        served.engine.switch_backend("tunable")
    assert served.bound() == {"sdpa"}
    monkeypatch.setattr(served.shardformer._switch, "_options", {"tunable": {"splits": 3}})
    served.engine.switch_backend("tunable")
    assert served.engine._runner.attention.of(0).options.splits == 3


def test_a_switch_that_waits_is_given_up_by_closing():
    exchange = EventExchange(SimpleNamespace(rank=0, size=2))
    switches = BackendSwitches(
        SimpleNamespace(check=lambda name: None),
        runner=None,
        store=None,
        updates=None,
        group=SimpleNamespace(rank=0, size=2),
        exchange=exchange,
        blocks_in_use=list,
    )
    change = switches.request("sdpa")
    assert not change.is_settled
    assert decode_events(encode_events(exchange._pending)) == [SwitchBackend("sdpa")]
    switches.close()
    assert change.is_settled
    assert isinstance(change.error, StateError)
    assert not change.is_done


def test_memory_is_flat_over_a_thousand_switches(served, prompts):
    engine = served.engine
    for prompt in prompts:
        engine.add_request(prompt, GREEDY)
    engine.step()
    bound, caches, sizes = weakref.WeakSet(), weakref.WeakSet(), []
    for turn in range(1000):
        engine.switch_backend(SERVING[turn % len(SERVING)])
        bound.add(engine._runner.attention.of(0))
        caches.add(engine.kv_cache)
        if turn in (99, 999):
            gc.collect()
            assert (len(bound), len(caches)) == (1, 1)
            sizes.append((len(gc.get_objects()), _resident_bytes()))
    assert sizes[1][0] - sizes[0][0] < 50
    assert sizes[1][1] - sizes[0][1] < 4 * 2**20
    while engine.has_unfinished():
        engine.step()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_closed_engine_and_one_without_a_switch_refuse():
    served = _serve()
    engine = served.engine
    engine.switch_backend("sdpa")  # of another layout than the next one
    cache = weakref.ref(engine.kv_cache)
    engine.switch_backend("transposed")
    gc.collect()
    assert cache() is None
    served.shardformer.close()
    with pytest.raises(StateError, match="closed"):
        engine.switch_backend("sdpa")


def test_a_switch_on_an_engine_without_one(tiny):
    engine = tiny.Setup().engine()
    with pytest.raises(StateError, match="attach"):
        engine.switch_backend("sdpa")


@pytest.mark.parametrize("layout", KVLayout, ids=lambda layout: layout.value)
def test_conversion_keeps_blocks_and_leaves_others_untouched(layout):
    spec = KVCacheSpec(2, 3, 5, 4, torch.float32)
    cache = PagedKVCache(spec, num_blocks=6, device=torch.device("cpu"))
    for index in range(2):
        for tensor in cache.layer(index):
            tensor.copy_(torch.randn(6, 4, 3, 5))
    converted = cache.converted(layout, [4, 1])
    back = converted.converted(KVLayout.NHD, range(6))
    for index in range(2):
        for old, new, again in zip(cache.layer(index), converted.layer(index), back.layer(index), strict=True):
            assert new.is_contiguous()
            assert new.shape == ((6, 4, 3, 5) if layout is KVLayout.NHD else (6, 3, 4, 5))
            assert new[4][2 if layout is KVLayout.NHD else 1, 1 if layout is KVLayout.NHD else 2, 3] == old[4, 2, 1, 3]
            assert torch.equal(again[[1, 4]], old[[1, 4]])
            assert not again[[0, 2, 3, 5]].any()
