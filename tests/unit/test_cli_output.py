"""What `generate` and `bench` write, over an engine that plays back a script."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from inference_shardformer.cli import bench
from inference_shardformer.cli.memory import peak_rss_bytes
from inference_shardformer.cli.output import Clock, TextWriter, write_json, write_text
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.cli.workload import Workload
from inference_shardformer.engine.outputs import RequestOutput, StepStats, StreamChunk
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import RequestError


class Letters:
    """A tokenizer with one token per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class ScriptedEngine:
    """Spells every prompt in capitals, one letter a step and request, the last request first. Refuses empty prompts."""

    def __init__(self, *, tokenizer: Letters | None = None) -> None:
        self.tokenizer = tokenizer or Letters()
        self.asked: list[tuple] = []
        self.num_resets = 0

    def reset_prefix_cache(self):
        self.num_resets += 1

    def stream(self, prompts, sampling):
        if not all(prompts):
            raise RequestError("the prompt is empty", remedy="pass a token")
        return self._chunks(prompts, sampling)

    def _chunks(self, prompts, sampling):
        self.asked.append((prompts, sampling))
        for step in range(max(map(len, prompts))):
            for index in reversed(range(len(prompts))):
                prompt = prompts[index]
                if step < len(prompt):
                    letter = prompt[step] if isinstance(prompt, str) else chr(prompt[step])
                    is_last = step + 1 == len(prompt)
                    yield StreamChunk(f"r{index}", index, letter.upper(), (ord(letter),), "length" if is_last else None)

    def generate(self, prompts, sampling, *, on_error, on_step):
        assert on_error == "return"
        on_step(StepStats(3, 0, 1, 0, 9, 0.1))
        on_step(StepStats(0, 1, 1, 0, 9, 0.1))
        return [self._output(index, prompt) for index, prompt in enumerate(prompts)]

    def _output(self, index, prompt):
        if not prompt:
            error = RequestError("the prompt is empty", remedy="pass a token")
            return RequestOutput(f"r{index}", index, prompt, (), (), "", "rejected", error=error)
        ids = tuple(self.tokenizer.encode(prompt))
        return RequestOutput(f"r{index}", index, prompt, ids, ids[:2], prompt.upper(), "length")


MAIN = Terminal(is_main=True)
PARAMS = [SamplingParams(max_new_tokens=n) for n in (1, 2, 3)]


def test_texts_are_never_interleaved_and_keep_their_order(capsys):
    engine = ScriptedEngine()
    assert write_text(engine, ["abc", "de", "f"], PARAMS, MAIN) == 0
    out, err = capsys.readouterr()
    assert out == "ABC\nDE\nF\n"
    assert [line for line in err.splitlines() if line.startswith("prompt")] == [
        "prompt     abc",
        "prompt     de",
        "prompt     f",
    ]
    assert "6 prompt tokens, 6 generated" in err
    assert "first token after" in err


def test_text_is_shown_as_it_comes(capsys):
    writer = TextWriter(MAIN, ["abc", "de"])
    writer.write(1, "D", is_last=False)
    assert capsys.readouterr().out == ""
    writer.write(0, "A", is_last=False)
    assert capsys.readouterr().out == "A"
    writer.write(1, "E", is_last=True)
    assert capsys.readouterr().out == ""
    writer.write(0, "B", is_last=True)
    assert capsys.readouterr().out == "B\nDE\n"


def test_a_refused_prompt_is_reported_and_the_others_run(capsys):
    engine = ScriptedEngine()
    assert write_text(engine, ["ab", "", "c"], PARAMS, MAIN) == 2
    assert engine.asked == [(["ab", "c"], [PARAMS[0], PARAMS[2]])]
    out, err = capsys.readouterr()
    assert out == "AB\nC\n"
    assert "error: prompt 1: the prompt is empty\n  remedy: pass a token" in err
    assert write_text(engine, [""], PARAMS[:1], MAIN) == 2
    assert "tokens/s" not in capsys.readouterr().err


def test_without_a_tokenizer_the_ids_are_shown(capsys):
    engine = ScriptedEngine()
    engine.tokenizer = None
    assert write_text(engine, [[97, 98]], PARAMS[:1], MAIN) == 0
    out, err = capsys.readouterr()
    assert out == " 97 98\n"
    assert "prompt     [2 token ids]" in err
    assert "2 prompt tokens" in err


def test_json_holds_one_object_per_prompt_in_order(capsys):
    assert write_json(ScriptedEngine(), ["abc", "", "de"], PARAMS, MAIN) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "index": 0,
            "prompt_token_ids": [97, 98, 99],
            "token_ids": [97, 98],
            "text": "ABC",
            "finish_reason": "length",
        },
        {"index": 1, "error": {"code": "request", "message": "the prompt is empty", "remedy": "pass a token"}},
        {"index": 2, "prompt_token_ids": [100, 101], "token_ids": [100, 101], "text": "DE", "finish_reason": "length"},
    ]
    assert "5 prompt tokens, 4 generated" in err
    assert write_json(ScriptedEngine(), ["abc"], PARAMS[:1], MAIN) == 0


@pytest.mark.parametrize("write", [write_json, write_text])
def test_other_ranks_write_nothing_but_know_the_exit_code(capsys, write):
    assert write(ScriptedEngine(), ["abc", "", "de"], PARAMS, Terminal(is_main=False)) == 2
    assert capsys.readouterr() == ("", "")


def test_the_first_token_comes_before_the_first_decode(monkeypatch):
    times = iter([100.0, 101.0, 102.0, 104.0, 108.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    for num_decode_tokens in (0, 0, 1):  # two chunks of a prompt end after 1 and 2 seconds, then it decodes
        clock.note_step(StepStats(8, num_decode_tokens, 1, 0, 9, 0.1))
    clock.stop()
    assert clock.summary(4, 16).endswith("16 generated in 8.00 s: 2.0 tokens/s, first token after 2.00 s")


def test_loading_is_one_line_where_nobody_watches(capsys):
    with MAIN.loading() as progress:
        progress(1_000_000, 2_500_000)
        progress(2_500_000, 2_500_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("loaded     2.5 MB of weights on rank 0; ready after ")
    with Terminal(is_main=False).loading() as progress:
        assert progress is None


def test_one_measurement_of_a_workload():
    engine = ScriptedEngine()
    group = SimpleNamespace(all_gather_bytes=lambda payload: [payload, str(int(payload) + 5).encode()])
    session = SimpleNamespace(engine=engine, shardformer=SimpleNamespace(group=group))
    result = bench._measure(session, Workload(2, [[97, 98], [99]], [2, 7]))
    assert (result["generated_tokens"], result["prompt_tokens"]) == (3, 3)
    assert result["generated_tokens_per_second"] == pytest.approx(3 / result["seconds"])
    assert 0 < result["time_to_first_token_s"] <= result["seconds"]
    assert result["peak_rss_bytes"] > 5 + 10**7
    ((prompts, sampling),) = engine.asked
    assert engine.num_resets == 1  # a repeat finds nothing of the one before
    assert prompts == [[97, 98], [99]]
    assert [(params.max_new_tokens, params.temperature, params.ignore_eos) for params in sampling] == [
        (2, 0.0, True),
        (7, 0.0, True),
    ]


def test_peak_memory_sees_what_was_touched():
    before = peak_rss_bytes()
    block = bytearray(before + 50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() >= before + 40_000_000
