"""The live configuration of an engine on one rank: limits, defaults, epochs, callbacks, and its end."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest

from inference_shardformer.config.changes import ConfigChange
from inference_shardformer.config.snapshot import UnknownSettingError
from inference_shardformer.config.store import MAX_QUEUED, QueuedUpdateError
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.config.violations import ConfigViolations
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.outputs import RequestOutput, StepStats
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import ConfigError, RequestError, StateError

SEQS = "inference.scheduler.max_num_seqs"
LENGTH = "inference.sampling.max_new_tokens"


def _drain(engine: InferenceEngine) -> dict[str, RequestOutput]:
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return {output.request_id: output for output in outputs}


def _no_change(engine: InferenceEngine) -> None:
    assert engine.config.current.epoch == 0
    assert engine.config[SEQS] == 64


def test_one_interface_reads_by_attribute_path_and_mapping(tiny: SimpleNamespace) -> None:
    config = tiny.Setup(max_num_seqs=7).engine().config
    assert config.inference.scheduler.max_num_seqs == config.get("scheduler.max_num_seqs") == config[SEQS] == 7
    assert config.current.epoch == 0
    assert config.shard.tp_size == 1
    assert config.inference.attention.backend == "plain"  # the decided value, not what was asked
    assert SEQS in config
    assert set(config) == {state.path for state in config.describe()}
    assert len(config) == len(list(config))
    assert repr(config) == "<ConfigStore epoch 0>"
    for read in (lambda: config.infrence, lambda: config["inference.scheduler.max_seqs"], lambda: config.get("x")):
        with pytest.raises(UnknownSettingError):
            read()
    with pytest.raises(AttributeError):
        config.inference = None
    assert not hasattr(config, "prepare")


@pytest.mark.parametrize("way", ["update_config", "config.update"])
def test_update_changes_several_fields_at_once(tiny: SimpleNamespace, way: str) -> None:
    engine = tiny.Setup().engine()
    update = engine.update_config if way == "update_config" else engine.config.update
    told = update({"scheduler.max_num_seqs": 3, LENGTH: 5}, source="operator")
    assert told.is_settled
    assert told.error is None
    assert told.snapshot is engine.config.current
    assert (engine.config.current.epoch, engine.config[SEQS], engine.config[LENGTH]) == (1, 3, 5)
    assert update({SEQS: 3}).snapshot.epoch == 1  # nothing changed, so no epoch


def test_limits_hold_from_the_next_step_and_nobody_is_preempted(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=256)
    engine = setup.engine()
    prompts = tiny.ragged_prompts(9)
    stats: list[StepStats] = []
    lengths = [4, 4, 4, 8, 8, 8, 8, 8, 8]

    def on_step(step: StepStats) -> None:
        stats.append(step)
        if len(stats) == 2:
            engine.update_config({SEQS: 2})
        if len(stats) == 10:
            engine.update_config({SEQS: 64, "scheduler.max_num_batched_tokens": 3})

    engine.update_config({SEQS: 6})
    outputs = engine.generate(prompts, [SamplingParams(max_new_tokens=n) for n in lengths], on_step=on_step)
    assert [step.config_epoch for step in stats] == [1, 1] + [2] * 8 + [3] * (len(stats) - 10)
    assert [step.num_running for step in stats][:10] == [6, 6, 6, 3, 3, 3, 3, 0, 2, 2]
    assert all(step.num_prefill_tokens + step.num_decode_tokens <= 3 for step in stats[10:])
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert list(output.token_ids) == setup.greedy(prompt, length)
        assert output.usage.num_preemptions == 0
        assert output.config_epoch == 1
    tiny.assert_all_free(engine)


def test_request_keeps_the_defaults_of_its_epoch_to_its_end(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(max_new_tokens=6)
    engine = setup.engine()
    engine.add_request([1], request_id="running")
    engine.step()
    engine.add_request([2], request_id="queued before")
    engine.update_config({LENGTH: 3, "sampling.temperature": 0.9})
    engine.add_request([3], request_id="after")
    engine.add_request([4], SamplingParams(temperature=0, max_new_tokens=9), request_id="own values")
    outputs = _drain(engine)
    assert {name: (output.config_epoch, len(output.token_ids)) for name, output in outputs.items()} == {
        "running": (0, 6),
        "queued before": (0, 6),
        "after": (1, 3),
        "own values": (1, 9),
    }
    assert list(outputs["queued before"].token_ids) == setup.greedy([2], 6)
    assert list(outputs["own values"].token_ids) == setup.greedy([4], 9)
    assert list(outputs["after"].token_ids) != setup.greedy([3], 3)


def test_stream_takes_the_epoch_in_which_it_starts(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(max_new_tokens=6, num_blocks=5).engine()
    chunks = engine.stream([[1]])
    engine.update_config({LENGTH: 3})
    assert len(list(chunks)) == 3
    late = engine.stream([[1]])
    engine.update_config({LENGTH: 100})
    with pytest.raises(RequestError, match="need 25 cache blocks"):  # valid when it was asked for, not any more
        list(late)
    tiny.assert_all_free(engine)
    [output] = engine.generate([[]], on_error="return")
    assert (output.finish_reason, output.config_epoch) == ("rejected", 2)


def test_ignore_eos_and_other_defaults_come_from_the_configuration(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=[97, 98, tiny.EOS], max_new_tokens=20, sampling={"ignore_eos": True})
    engine = setup.engine()
    [ignoring] = engine.generate([[5]])
    assert list(ignoring.token_ids) == setup.greedy([5], 20, ends_at=())
    [own] = engine.generate([[5]], SamplingParams(ignore_eos=False))
    engine.update_config({"sampling.ignore_eos": False})
    [live] = engine.generate([[5]])
    assert list(own.token_ids) == list(live.token_ids) == setup.greedy([5], 20)
    assert own.finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"cache.block_size": 8}, ["inference.cache.block_size = 8", "init_only", "cache tensors are already"]),
        ({"prompt.template": "llama"}, ["inference.prompt.template", "init_only"]),
        ({SEQS: 0, LENGTH: "9"}, [f"{SEQS} = 0", "at least 1", f"{LENGTH} = "]),
        ({"scheduler.max_seqs": 3, SEQS: 4}, ["scheduler.max_seqs", "max_num_seqs"]),
        ({SEQS: object()}, [SEQS, "an integer"]),
    ],
)
def test_refused_update_says_everything_and_changes_nothing(
    tiny: SimpleNamespace, changes: dict[str, object], texts: list[str]
) -> None:
    engine = tiny.Setup().engine()
    with pytest.raises(ConfigViolations) as caught:
        engine.update_config(changes, source="operator")
    assert all(text in str(caught.value) for text in [*texts, "operator"])
    _no_change(engine)


def test_veto_rolls_back_and_the_next_update_works(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    heard: list[tuple[str, tuple[ConfigChange, ...]]] = []
    engine.config.subscribe(
        "scheduler.*", lambda c: heard.append(("told", c)), on_rollback=lambda c: heard.append(("back", c))
    )

    def at_most_8(changes: tuple[ConfigChange, ...]) -> None:
        if changes[0].new > 8:
            raise ConfigVeto("at most 8", remedy="ask for less")

    end = engine.config.subscribe(SEQS, at_most_8)
    with pytest.raises(ConfigVeto, match="at most 8"):
        engine.update_config({SEQS: 9, LENGTH: 3})
    _no_change(engine)
    assert engine.config[LENGTH] == 16
    change = ConfigChange(SEQS, 64, 9, 1, "call")
    assert heard == [("told", (change,)), ("back", (change,))]
    engine.update_config({SEQS: 8})
    end()
    engine.update_config({SEQS: 9})
    assert engine.config.current.epoch == 2


def test_callback_may_read_and_update_but_not_generate(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    seen: list[object] = []

    def callback(changes: tuple[ConfigChange, ...]) -> None:
        queued = engine.update_config({LENGTH: changes[0].new + 1}, source="follow-up")
        seen.append((engine.config[SEQS], engine.num_unfinished, queued))
        for call in (engine.step, engine.close, lambda: engine.generate([[1]])):
            with pytest.raises(StateError, match="by a callback"):
                call()

    engine.config.subscribe(SEQS, callback)
    engine.update_config({SEQS: 5})
    [(seats, unfinished, queued)] = seen
    assert (seats, unfinished) == (64, 0)
    assert (engine.config[LENGTH], engine.config.current.epoch) == (6, 2)
    assert queued.snapshot is engine.config.current
    assert len(engine.generate([[1]])[0].token_ids) == 6


def test_what_callbacks_ask_for_can_fail_alone_or_without_end(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    asked: list[object] = []
    end = engine.config.subscribe(SEQS, lambda _: asked.append(engine.update_config({LENGTH: 0})))
    with pytest.raises(QueuedUpdateError, match="epoch 1 took effect"):
        engine.update_config({SEQS: 5})
    assert isinstance(asked[0].error, ConfigViolations)
    assert (engine.config[SEQS], engine.config.current.epoch) == (5, 1)
    end()
    end = engine.config.subscribe(SEQS, lambda _: engine.update_config({"cache.block_size": 8}))
    with pytest.raises(ConfigError, match="init_only"):  # a wrong name is the callback's own error
        engine.update_config({SEQS: 6})
    end()
    engine.config.subscribe(SEQS, lambda changes: engine.update_config({SEQS: changes[0].new % 2 + 1}))
    with pytest.raises(QueuedUpdateError, match=f"more than {MAX_QUEUED}"):
        engine.update_config({SEQS: 1})
    engine.update_config({LENGTH: 4})


def test_update_of_a_refused_transaction_is_dropped(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()

    def asks_and_refuses(changes: object) -> None:
        engine.update_config({LENGTH: 4})
        raise ConfigVeto("no")

    engine.config.subscribe(SEQS, lambda _: None, on_rollback=lambda _: engine.update_config({LENGTH: 5}))
    end = engine.config.subscribe(SEQS, asks_and_refuses)
    with pytest.raises(ConfigVeto):
        engine.update_config({SEQS: 5})
    end()
    engine.update_config({SEQS: 5})
    assert (engine.config.current.epoch, engine.config[LENGTH]) == (1, 16)


def test_closed_engine_reads_updates_and_subscribes_no_more(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    before = engine.config.current
    config = engine.config
    engine.close()
    for call in (
        lambda: engine.update_config({SEQS: 3}),
        lambda: config.update({SEQS: 3}),
        lambda: config.subscribe(SEQS, print),
        lambda: config.inference,
        lambda: config.get(SEQS),
    ):
        with pytest.raises(StateError, match="closed"):
            call()
    assert before[SEQS] == 64
    assert repr(config) == "<ConfigStore closed>"
    with pytest.raises(StateError, match="gone"):
        tiny.Setup().engine().config.update({SEQS: 3})


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "dropped"])
def test_nothing_outlives_the_engine(tiny: SimpleNamespace, is_closed: bool) -> None:
    class Subscriber:
        def hear(self, changes: object) -> None:
            return None

    engine = tiny.Setup().engine()
    subscriber = Subscriber()
    engine.config.subscribe("*", subscriber.hear)
    engine.add_request([1])
    engine.step()
    engine.update_config({SEQS: 5})
    things = [engine._core, engine._access._desk, engine.kv_cache, engine._runner._model, subscriber]
    gone = [weakref.ref(thing) for thing in things]
    config, snapshot = engine.config, engine.config.current
    gc.disable()  # nothing may need the collector
    try:
        del things, subscriber
        if is_closed:
            engine.close()
        else:
            gone += [weakref.ref(engine), weakref.ref(engine._store)]
            del engine, config
        assert [reference() for reference in gone] == [None] * len(gone)
        assert snapshot[SEQS] == 5
    finally:
        gc.enable()


def test_two_engines_never_see_each_other(tiny: SimpleNamespace) -> None:
    first, second = tiny.Setup().engine(), tiny.Setup().engine()
    heard: list[object] = []
    second.config.subscribe("*", heard.append)
    first.update_config({SEQS: 3, LENGTH: 2})
    assert heard == []
    _no_change(second)
    assert len(second.generate([[1]])[0].token_ids) == 16
    first.close()
    assert second.config[SEQS] == 64
