"""Streaming: chunks add up to the output, hold whole characters, and an abandoned stream frees everything."""

from __future__ import annotations

import gc
from collections import defaultdict
from types import SimpleNamespace

import pytest

from inference_shardformer.engine.outputs import StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams

LETTERS = range(97, 123)


def _by_index(chunks: list[StreamChunk]) -> dict[int, list[StreamChunk]]:
    grouped = defaultdict(list)
    for chunk in chunks:
        grouped[chunk.index].append(chunk)
    return grouped


@pytest.mark.parametrize(
    "alphabet", [range(256), LETTERS, [0xE6, 0x97, 0xA5, 97, 256]], ids=["bytes", "text", "japanese"]
)
def test_chunks_add_up_to_the_outputs(tiny: SimpleNamespace, alphabet: list[int]) -> None:
    setup = tiny.Setup(num_blocks=20, alphabet=alphabet)
    prompts = tiny.ragged_prompts(10)
    outputs = setup.engine().generate(prompts)
    engine = setup.engine()
    grouped = _by_index(list(engine.stream(prompts)))
    assert sorted(grouped) == list(range(10))
    for output in outputs:
        chunks = grouped[output.index]
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [output.finish_reason]
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == output.token_ids
        assert "".join(chunk.text for chunk in chunks) == output.text
    tiny.assert_all_free(engine)


def test_text_appears_as_it_is_made(tiny: SimpleNamespace) -> None:
    chunks = list(tiny.Setup(alphabet=LETTERS).engine().stream("hello"))
    assert [len(chunk.text) for chunk in chunks] == [1] * 16


def test_stop_text_never_shows_in_a_stream(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(alphabet=LETTERS)
    whole = bytes(setup.greedy(b"hello", 16)).decode()
    chunks = list(setup.engine().stream("hello", SamplingParams(stop=[whole[4:8], whole[4:6] + "!!"])))
    assert "".join(chunk.text for chunk in chunks) == whole[:4]
    assert [chunk.text for chunk in chunks[4:]] == [""] * 4
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("num_read", [1, 7])
def test_closing_the_iterator_aborts_the_rest(tiny: SimpleNamespace, num_read: int) -> None:
    engine = tiny.Setup(num_blocks=24).engine()
    chunks = engine.stream(tiny.ragged_prompts(9))
    for _ in range(num_read):
        next(chunks)
    assert engine.num_unfinished == 9
    chunks.close()
    tiny.assert_all_free(engine)
    assert not engine.has_unfinished()


def test_stream_that_is_collected_in_a_step_is_given_up_after_it(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(num_blocks=24)
    engine = setup.engine()
    model, lost = engine._runner._model, [engine.stream(tiny.ragged_prompts(9))]
    next(lost[0])
    lost.append(lost)  # as an exception that is kept in its own frame does

    def collecting(**arguments: object) -> object:
        engine._runner._model = model
        gc.collect()
        return model(**arguments)

    engine._runner._model = collecting
    gc.disable()
    try:
        del lost
        [output] = engine.generate([[1]])
    finally:
        gc.enable()
    assert list(output.token_ids) == setup.greedy([1], 16)
    tiny.assert_all_free(engine)


def test_closing_an_iterator_waits_for_nobody(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup(num_blocks=24).engine()
    chunks = engine.stream(tiny.ragged_prompts(9))
    next(chunks)
    lock = engine._access.lock
    lock.__enter__()
    lock._owner = -1  # another thread is in a step
    chunks.close()
    lock.__exit__()
    assert engine.num_unfinished == 0
    tiny.assert_all_free(engine)


def test_iterator_that_was_never_read_queues_nothing(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    engine.stream([[1]]).close()
    tiny.assert_all_free(engine)


def test_two_streams_interleave(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup()
    engine = setup.engine()
    streams = [engine.stream([[i]]) for i in (1, 2)]
    tokens = [[], []]
    for _ in range(16):
        for i, stream in enumerate(streams):
            tokens[i] += next(stream).token_ids
    assert tokens == [setup.greedy([1], 16), setup.greedy([2], 16)]
    assert [list(stream) for stream in streams] == [[], []]
    tiny.assert_all_free(engine)


def test_aborted_request_ends_its_stream(tiny: SimpleNamespace) -> None:
    engine = tiny.Setup().engine()
    chunks = engine.stream([[1], [2]])
    first = next(chunks)
    assert engine.abort(first.request_id)
    rest = _by_index(list(chunks))
    assert [chunk.finish_reason for chunk in rest[0]] == ["abort"]
    assert len(rest[1]) == 16


def test_without_a_tokenizer_tokens_are_streamed(tiny: SimpleNamespace) -> None:
    setup = tiny.Setup(tokenizer=None)
    chunks = list(setup.engine().stream([[1]]))
    assert [chunk.token_ids[0] for chunk in chunks] == setup.greedy([1], 16)
    assert {chunk.text for chunk in chunks} == {""}
