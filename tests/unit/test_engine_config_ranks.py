"""Updates of the live configuration on several ranks (threads): at the same step on all of them, or on none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from inference_shardformer.config.store import MAX_QUEUED
from inference_shardformer.config.subscriptions import ConfigVeto
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.engine.outputs import StepStats
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import ConfigError, StateError

SEQS = "inference.scheduler.max_num_seqs"
LENGTH = "inference.sampling.max_new_tokens"


def _engine(tiny: SimpleNamespace, group: object, **settings: object) -> InferenceEngine:
    return tiny.Setup(**settings).engine(group, tiny.NullGuard())


def _veto(changes: tuple) -> None:
    raise ConfigVeto(f"not {changes[0].new}", remedy="ask for something else")


def _ranks(tiny: SimpleNamespace, program: object, size: int = 2) -> list:
    """What each rank returned; raises what the first failing one raised."""
    results = tiny.run_ranks(size, program)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("who", ["rank 0 alone", "every rank"])
def test_update_takes_effect_at_the_same_step_everywhere(tiny: SimpleNamespace, who: str) -> None:
    prompts = tiny.ragged_prompts(8)
    expected = [output.token_ids for output in tiny.Setup().engine().generate(prompts)]

    def program(group: object) -> tuple:
        engine = _engine(tiny, group)
        stats: list[StepStats] = []

        def on_step(step: StepStats) -> None:
            stats.append(step)
            if len(stats) % 3 == 1 and (who == "every rank" or group.rank == 0):
                before = engine.config.current
                told = engine.update_config({SEQS: 1 + len(stats) % 5, "scheduler.max_num_batched_tokens": 40})
                assert not told.is_settled
                assert engine.config.current is before  # until the boundary

        outputs = engine.generate(prompts, on_step=on_step)
        tiny.assert_all_free(engine)
        facts = [(step.config_epoch, step.num_running, step.num_prefill_tokens) for step in stats]
        return facts, [output.token_ids for output in outputs], engine.config.current

    first, *others = _ranks(tiny, program, 3)
    assert all(other == first for other in others)
    facts, tokens, snapshot = first
    assert tokens == expected
    assert snapshot.epoch > 3
    assert [epoch for epoch, _, _ in facts][:5] == [0, 1, 1, 1, 2]


def test_requests_after_an_update_get_its_defaults_and_those_before_do_not(tiny: SimpleNamespace) -> None:
    def program(group: object) -> list:
        engine = _engine(tiny, group)
        engine.add_request([1], request_id="before")
        if group.rank == 0:
            engine.update_config({LENGTH: 3})
        engine.add_request([2], request_id="after")
        outputs = [output for _ in range(17) for output in engine.step()]
        return [(output.request_id, output.config_epoch, len(output.token_ids)) for output in outputs]

    assert _ranks(tiny, program) == [[("after", 1, 3), ("before", 0, 16)]] * 2


@pytest.mark.parametrize("objector", [0, 1, 2])
def test_veto_of_any_rank_gives_an_update_up_on_all(
    tiny: SimpleNamespace, objector: int, caplog: pytest.LogCaptureFixture
) -> None:
    def program(group: object) -> tuple:
        engine = _engine(tiny, group)
        heard: list[str] = []
        engine.config.subscribe(
            "*", lambda c: heard.append(f"told {c[0].new}"), on_rollback=lambda c: heard.append(f"back {c[0].new}")
        )
        if group.rank == objector:
            end = engine.config.subscribe(SEQS, _veto)
        told = None
        if group.rank == 0:
            try:
                told = engine.update_config({SEQS: 5, LENGTH: 4})
            except ConfigVeto as error:
                told = error
        engine.generate([[1]])
        epoch = engine.config.current.epoch
        if group.rank == objector:
            end()
        engine.update_config({SEQS: 6})
        [output] = engine.generate([[1]])
        return told, heard, epoch, engine.config.current.epoch, engine.config[SEQS], output.config_epoch

    with caplog.at_level(logging.WARNING, logger="inference_shardformer"):
        results = _ranks(tiny, program, 3)
    told = results[0][0]
    if objector == 0:
        assert isinstance(told, ConfigVeto)
        assert [heard for _, heard, *_ in results] == [["told 5", "back 5", "told 6"], ["told 6"], ["told 6"]]
    else:
        assert told.snapshot is None
        assert isinstance(told.error, ConfigVeto)
        assert f"rank {objector}: " in told.error.message
        assert "not 5" in told.error.message
        assert told.error.remedy == "ask for something else"
        assert [heard for _, heard, *_ in results] == [["told 5", "back 5", "told 6"]] * 3
        assert f"rank {objector}: " in caplog.text
    assert [tuple(rest) for _, _, *rest in results] == [(0, 1, 6, 1)] * 3


def test_same_call_on_every_rank_where_rank_0_objects(tiny: SimpleNamespace) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        if group.rank == 0:
            engine.config.subscribe(SEQS, _veto)
            with pytest.raises(ConfigVeto):
                engine.update_config({SEQS: 5})
            told = engine.update_config({LENGTH: 5})
        else:
            refused = engine.update_config({SEQS: 5})
            told = engine.update_config({LENGTH: 5})
        engine.step()
        if group.rank == 1:
            assert "rank 0 did not" in refused.error.message
            assert refused.snapshot is None
        assert told.snapshot is engine.config.current
        return [engine.config.current.epoch, engine.config[SEQS], engine.config[LENGTH]]

    assert _ranks(tiny, program) == [[1, 64, 5]] * 2


def test_what_rank_0_did_not_ask_for_is_given_up(tiny: SimpleNamespace) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        heard: list[object] = []
        engine.config.subscribe(SEQS, lambda c: heard.append(c[0].new), on_rollback=lambda c: heard.append(-c[0].new))
        if group.rank == 0:
            engine.step()
            engine.update_config({SEQS: 7})
        else:
            alone = engine.update_config({SEQS: 5})
            engine.step()
            assert isinstance(alone.error, ConfigError)
            engine.update_config({SEQS: 6})
        engine.step()
        return heard, engine.config[SEQS], engine.config.current.epoch

    first, second = _ranks(tiny, program)
    assert first == ([7], 7, 1)
    assert second == ([5, -5, 6, -6, 7], 7, 1)


def test_several_updates_between_two_steps_come_in_their_order(tiny: SimpleNamespace) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        heard: list[tuple[int, int]] = []
        engine.config.subscribe("*", lambda c: heard.append((c[0].old, c[0].new)))
        told = []
        if group.rank == 0:
            told = [engine.update_config({SEQS: seats}) for seats in (5, 6, 7)]
            with pytest.raises(ConfigError):
                engine.update_config({SEQS: 0})  # validated at once, though its turn comes later
            assert heard == [(64, 5)]
        engine.step()
        assert [update.snapshot.epoch for update in told] == ([1, 2, 3] if told else [])
        return heard, engine.config[SEQS]

    assert _ranks(tiny, program) == [([(64, 5), (5, 6), (6, 7)], 7)] * 2


@pytest.mark.parametrize("subscribers", [[0], [0, 1]], ids=["on rank 0", "on both"])
def test_what_callbacks_ask_for_follows_at_the_same_boundary(tiny: SimpleNamespace, subscribers: list[int]) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        asked = []
        if group.rank in subscribers:
            engine.config.subscribe(SEQS, lambda c: asked.append(engine.config.update({LENGTH: c[0].new})))
        if group.rank == 0:
            engine.update_config({SEQS: 5})
            engine.update_config({SEQS: 6})
        engine.step()
        assert all(update.is_settled for update in asked)
        return engine.config.current.epoch, engine.config[LENGTH]

    assert _ranks(tiny, program) == [(4, 6)] * 2


def test_callbacks_that_never_agree_end_with_an_error(tiny: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        if group.rank == 0:
            engine.config.subscribe(SEQS, lambda c: engine.config.update({SEQS: c[0].new % 2 + 1}))
            engine.update_config({SEQS: 1})
        engine.step()
        engine.update_config({LENGTH: 3})
        engine.step()
        return engine.config.current.epoch, engine.config[LENGTH]

    assert _ranks(tiny, program) == [(MAX_QUEUED + 1, 3)] * 2
    assert f"more than {MAX_QUEUED}" in caplog.text


def test_broken_rollback_is_told_and_changes_nothing(tiny: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    def broken(changes: object) -> None:
        raise RuntimeError("cannot go back")

    def program(group: object) -> object:
        engine = _engine(tiny, group)
        if group.rank == 0:
            engine.config.subscribe(SEQS, lambda _: None, on_rollback=broken)
            told = engine.update_config({SEQS: 5})
        else:
            engine.config.subscribe(SEQS, _veto)
        engine.step()
        if group.rank == 0:
            assert "not 5" in told.error.message
        return engine.config.current.epoch

    assert _ranks(tiny, program) == [0, 0]
    assert "cannot go back" in caplog.text


def test_closing_rolls_back_what_waits(tiny: SimpleNamespace) -> None:
    def program(group: object) -> object:
        engine = _engine(tiny, group)
        heard: list[str] = []
        engine.config.subscribe("*", lambda _: heard.append("told"), on_rollback=lambda _: heard.append("back"))
        told = engine.update_config({SEQS: 5})
        engine.close()
        assert isinstance(told.error, StateError)
        return heard

    assert _ranks(tiny, program) == [["told", "back"]] * 2


def test_an_update_alone_is_no_work(tiny: SimpleNamespace) -> None:
    """Ranks that step while there is work must do so equally often, whoever asked for an update."""

    def program(group: object) -> object:
        engine = _engine(tiny, group)
        engine.add_request([1], SamplingParams(max_new_tokens=3))
        num_steps = 0
        while engine.has_unfinished():
            engine.step()
            num_steps += 1
            if group.rank == 0:
                engine.update_config({SEQS: 10 + num_steps})
        return num_steps

    assert _ranks(tiny, program) == [3, 3]
