"""Engines with a prefix cache: the tokens are those without, and users see what was found."""

from __future__ import annotations

import random

import pytest
from tiny_models import hf_greedy, tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.engine.events import ResetPrefixCache, decode_events, encode_events
from inference_shardformer.engine.outputs import PrefixCacheStats
from inference_shardformer.errors import RequestError, StateError
from inference_shardformer.resolving.prefix_caching import choose_prefix_caching

LETTERS = range(97, 123)
SYSTEM = [random.Random(0).randrange(97, 123) for _ in range(21)]


def _prompts(num: int, seed: int = 0) -> list[list[int]]:
    """Half of them begin alike."""
    rng = random.Random(seed)
    return [
        [*(SYSTEM if i % 2 else []), *(rng.randrange(97, 123) for _ in range(rng.randint(1, 12)))] for i in range(num)
    ]


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "length-dependent rope"])
@pytest.mark.parametrize("num_blocks", [14, 200])
def test_tokens_are_those_without(tiny, num_blocks: int, rope: bool, overlap: str) -> None:
    limits = {"num_blocks": num_blocks, "max_num_seqs": 6, "length_dependent_rope": rope, "alphabet": LETTERS}
    engine = tiny.Setup(**limits, prefix_caching="on", overlap=overlap, max_num_batched_tokens=24).engine()
    plain = tiny.Setup(**limits)
    for turn in range(3):
        prompts = _prompts(8, seed=turn % 2)  # the third time all are known
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=13))
        assert [list(output.token_ids) for output in outputs] == [plain.greedy(prompt, 13) for prompt in prompts]
    stats = engine.prefix_cache_stats
    assert 0 < stats.num_cached_tokens < stats.num_queried_tokens
    assert (stats.num_reclaimed_blocks > 0) == (num_blocks == 14)
    assert stats.num_blocks <= num_blocks
    tiny.assert_all_free(engine)


def test_ranks_agree(tiny) -> None:
    prompts = _prompts(9)
    params = [SamplingParams(temperature=i % 3 / 2, seed=i, max_new_tokens=2 * i + 1) for i in range(9)]
    expected = [o.token_ids for o in tiny.Setup(alphabet=LETTERS, num_blocks=14).engine().generate(prompts, params)]

    def program(group: object) -> list:
        engine = tiny.Setup(alphabet=LETTERS, num_blocks=14, prefix_caching="on").engine(group, tiny.NullGuard())
        told = []
        for turn in range(3):
            if turn == 2 and group.rank == 0:
                engine.reset_prefix_cache()
            outputs = engine.generate(prompts, params)
            assert [output.token_ids for output in outputs] == expected
            told.append([output.usage.num_cached_tokens for output in outputs])
        tiny.assert_all_free(engine)
        return [told, engine.prefix_cache_stats, engine._core.scheduler.allocator.idle_blocks]

    first, second = tiny.run_ranks(2, program)
    assert first == second
    assert sum(first[0][1]) > sum(first[0][0])
    assert first[0][2] == first[0][0]  # forgotten on both ranks, at the same step


def test_users_see_what_was_found(tiny) -> None:
    engine = tiny.Setup(prefix_caching="on", alphabet=LETTERS).engine()
    steps: list = []
    params = SamplingParams(max_new_tokens=2)
    engine.generate([SYSTEM], params)
    (output,) = engine.generate([[*SYSTEM, 97]], params, on_step=steps.append)
    assert output.usage.num_cached_tokens == 20
    assert [(step.num_queried_tokens, step.num_cached_tokens) for step in steps] == [(22, 20), (0, 0)]
    assert [step.num_prefill_tokens for step in steps] == [2, 0]
    assert engine.prefix_cache_stats == PrefixCacheStats(43, 20, 5, 0)
    engine.reset_prefix_cache()
    assert engine.prefix_cache_stats == PrefixCacheStats(43, 20, 0, 0)
    (output,) = engine.generate([SYSTEM], params)
    assert output.usage.num_cached_tokens == 0


def test_without_a_cache_there_is_nothing_to_see(tiny) -> None:
    engine = tiny.Setup(alphabet=LETTERS).engine()
    engine.reset_prefix_cache()
    for _ in range(2):
        (output,) = engine.generate([SYSTEM])
        assert output.usage.num_cached_tokens == 0
    assert engine.prefix_cache_stats is None
    engine.close()
    with pytest.raises(StateError, match="reset_prefix_cache"):
        engine.reset_prefix_cache()


def test_a_salt_travels_and_is_checked(tiny) -> None:
    engine = tiny.Setup(prefix_caching="on", alphabet=LETTERS).engine()
    for salt, found in (("a", 0), ("b", 0), (None, 0), ("a", 20)):
        (output,) = engine.generate([SYSTEM], SamplingParams(cache_salt=salt))
        assert output.usage.num_cached_tokens == found
    for wrong in ("", 3):
        with pytest.raises(RequestError, match="cache_salt"):
            SamplingParams(cache_salt=wrong)


def test_a_reset_is_an_event_like_others() -> None:
    assert decode_events(encode_events([ResetPrefixCache()])) == [ResetPrefixCache()]


def _serve(**cache: object) -> InferenceShardformer:
    inference = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"block_size": 4, "num_blocks": 40, **cache}})
    return InferenceShardformer(None, inference, sources=ConfigSources(environ={}))


def test_new_weights_find_nothing_of_the_old_ones() -> None:
    prompt = [token % 150 for token in SYSTEM]
    greedy = SamplingParams(max_new_tokens=6, ignore_eos=True)
    with _serve() as mine:
        engine = mine.attach(mine.optimize(tiny_model("gqa"))[0])
        engine.generate([prompt], greedy)
        engine.update_weights(tiny_model("gqa", seed=7).state_dict())
        for found in (0, 20):
            (output,) = engine.generate([prompt], greedy)
            assert output.usage.num_cached_tokens == found
            assert list(output.token_ids) == hf_greedy(tiny_model("gqa", seed=7), prompt, 6)


def test_a_request_over_new_weights_is_not_found_either() -> None:
    """What it computed before them, and what it computes on top of that afterwards."""
    prompt = [token % 150 for token in SYSTEM]
    with _serve() as mine:
        engine = mine.attach(mine.optimize(tiny_model("gqa"))[0])
        engine.add_request(prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))
        for _ in range(5):
            engine.step()
        engine.update_weights(tiny_model("gqa", seed=7).state_dict())
        outputs = []
        while not outputs:
            outputs = engine.step()
        turn = [*prompt, *outputs[0].token_ids]
        (output,) = engine.generate([turn], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert output.usage.num_cached_tokens == 0
    assert list(output.token_ids) == hf_greedy(tiny_model("gqa", seed=7), turn, 6)


@pytest.mark.parametrize("names", [("cpu", "sdpa"), ("sdpa", "reference")], ids=["another layout", "the same layout"])
def test_another_backend_finds_nothing_of_the_old_one(names: tuple[str, str]) -> None:
    prompt, greedy = [token % 150 for token in SYSTEM], SamplingParams(max_new_tokens=6, ignore_eos=True)
    expected = hf_greedy(tiny_model("gqa"), prompt, 6)
    with _serve() as mine:
        engine = mine.attach(mine.optimize(tiny_model("gqa"))[0])
        engine.switch_backend(names[0])
        engine.generate([prompt], greedy)
        first = engine.add_request(prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))
        second = engine.add_request([*prompt, 3], SamplingParams(max_new_tokens=20, ignore_eos=True))
        for _ in range(3):
            engine.step()  # two that share blocks are running
        engine.switch_backend(names[1])
        for found in (0, 20):
            (output,) = engine.generate([prompt], greedy)
            assert output.usage.num_cached_tokens == found
            assert list(output.token_ids) == expected
        done = {output.request_id: output for _ in range(30) for output in engine.step()}
    assert list(done[first].token_ids) == hf_greedy(tiny_model("gqa"), prompt, 20)
    assert list(done[second].token_ids) == hf_greedy(tiny_model("gqa"), [*prompt, 3], 20)
    assert done[second].usage.num_cached_tokens == 20


def _facts(tiny, **more: object) -> ModelFacts:
    return ModelFacts(**{**tiny.Setup().facts().__dict__, **more})


def test_auto_is_on_where_prompts_have_keys_in_common(tiny) -> None:
    def chosen(asked: str, **more: object) -> tuple[str, bool]:
        inference = InferenceConfig.model_validate({"cache": {"prefix_caching": asked}})
        decided = choose_prefix_caching(inference, _facts(tiny, **more))
        return decided.value, bool(decided.reason)

    assert chosen("auto") == ("on", True)
    assert chosen("auto", length_dependent_rope=True) == ("off", True)
    assert chosen("auto", length_dependent_rope=True, rope_switch_length=64) == ("on", True)
    assert chosen("on", length_dependent_rope=True) == ("on", False)
    assert chosen("off") == ("off", False)
