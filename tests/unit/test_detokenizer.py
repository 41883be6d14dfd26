"""Incremental text: whole characters only, equal to decoding at once, cut before stop texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inference_shardformer.config.inference import SamplingDefaults
from inference_shardformer.engine.detokenizer import Detokenizer, RequestText, Tokenizer
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.engine.stop_strings import StopStrings

SAMPLE = "def naïve(x):  # 日本語 👩‍👩‍👧 done.\n    return 'x' . y ? n't\n"


def _byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 and Llama 3 have it, with a few merges."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("d", "e"), ("Ġ", "r"), ("de", "f"), ("Ġ", "Ġ"), ("ã", "ģ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def _byte_fallback() -> PreTrainedTokenizerFast:
    """Words with a leading mark and bytes for everything else, as Llama 2 has it; the first space is dropped."""
    words = ["▁def", "▁x", "▁", "return", "▁.", "y"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


BYTE_LEVEL, BYTE_FALLBACK = _byte_level(), _byte_fallback()


def _pieces(tokenizer: Tokenizer, token_ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def _text(tokenizer: Tokenizer | None, token_ids: list[int], *, lazily: bool = False, **given_params: object) -> str:
    """The text of a request that gets `token_ids` one by one, and the text put together from what was taken."""
    sampling = SamplingParams(**given_params).resolve(SamplingDefaults())
    growing = [999_999]
    text = RequestText(tokenizer, growing, start=1, sampling=sampling)
    taken = ""
    for token_id in token_ids:
        growing.append(token_id)
        if not lazily:
            taken += text.take()
            if text.advance() is not None:
                break
    text.finish()
    assert taken + text.take() == text.text
    return text.text


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_of_real_text_are_whole_characters(skip: bool) -> None:
    token_ids = [*BYTE_LEVEL.encode(SAMPLE), BYTE_LEVEL.eos_token_id]
    pieces = _pieces(BYTE_LEVEL, token_ids, skip=skip)
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 40


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=150))
def test_any_byte_level_tokens_give_the_text_of_all(token_ids: list[int]) -> None:
    assert "".join(_pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([[257], [258], [259], [256], [260], [262], list("日".encode()), [10]]), max_size=60))
def test_leading_spaces_survive_windows(words: list[list[int]]) -> None:
    token_ids = [token_id for word in words for token_id in word]
    assert "".join(_pieces(BYTE_FALLBACK, token_ids)) == BYTE_FALLBACK.decode(token_ids, skip_special_tokens=True)


def test_leading_space_survives_a_long_run_of_special_tokens() -> None:
    word, eos = BYTE_FALLBACK.convert_tokens_to_ids("▁x"), BYTE_FALLBACK.eos_token_id
    assert "".join(_pieces(BYTE_FALLBACK, [word] * 10 + [eos] * 40 + [word] * 3)) == "x" + " x" * 12


def test_work_per_token_does_not_grow_with_the_text() -> None:
    class Counting:
        longest = 0

        def encode(self, text: str) -> list[int]:
            raise NotImplementedError

        def decode(self, token_ids: list[int], **_: bool) -> str:
            Counting.longest = max(Counting.longest, len(token_ids))
            return BYTE_LEVEL.decode(token_ids)

    for text in (SAMPLE * 20, "日本語" * 100):
        _pieces(Counting(), BYTE_LEVEL.encode(text))
        assert Counting.longest <= 20
    broken = BYTE_LEVEL.convert_tokens_to_ids("ÿ")
    assert "".join(_pieces(Counting(), [broken] * 500)) == "\ufffd" * 500
    assert Counting.longest <= 70


def test_half_a_character_is_held_and_shown_at_the_end() -> None:
    token_ids = BYTE_LEVEL.encode("a日")
    assert _pieces(BYTE_LEVEL, token_ids[:-1]) == ["a", *[""] * (len(token_ids) - 2), "\ufffd"]
    assert _text(BYTE_LEVEL, token_ids[:-1]) == "a\ufffd"


@pytest.mark.parametrize("lazily", [True, False], ids=["at once", "step by step"])
def test_text_without_stop_is_that_of_all_tokens(lazily: bool) -> None:
    token_ids = BYTE_LEVEL.encode(SAMPLE)
    assert _text(BYTE_LEVEL, token_ids, lazily=lazily) == SAMPLE


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["return"], SAMPLE.split("return")[0]),
        (["日本"], SAMPLE.split("日本")[0]),
        (["zzz", "done", "日"], SAMPLE.split("日")[0]),
        (["\n    return 'x' . y ? n't\nmore"], SAMPLE),
        (["def"], ""),
    ],
    ids=["across tokens", "characters", "first of several", "never completed", "at the start"],
)
def test_text_ends_before_the_first_stop_text(stop: list[str], expected: str) -> None:
    assert _text(BYTE_LEVEL, BYTE_LEVEL.encode(SAMPLE), stop=stop) == expected


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert _text(None, [1, 2, 3]) == ""


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_equal_a_search_in_the_whole_text(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopStrings(stop)
    released = "".join(matcher.push(piece) for piece in pieces) + matcher.push("", is_last=True)
    first_end = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if first_end is None:
        assert (released, matcher.matched) == (text, None)
    else:
        assert matcher.matched in stop
        assert matcher.matched not in released
        assert text.startswith(released + matcher.matched)


def test_nothing_is_held_longer_than_needed() -> None:
    matcher = StopStrings(["stop"])
    assert [matcher.push(piece) for piece in ("as", "t", "x", "sto")] == ["a", "", "stx", ""]
    assert matcher.push("p tail") == ""
    assert matcher.matched == "stop"
    assert matcher.push("more", is_last=True) == ""
