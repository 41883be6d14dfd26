"""What `generate` writes: streamed text for people, one JSON object per output for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from inference_shardformer.cli.report import error_object, report_error
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.errors import RequestError

if TYPE_CHECKING:
    from inference_shardformer import InferenceEngine, RequestOutput, SamplingParams
    from inference_shardformer.engine.outputs import StepStats

Prompts = Sequence[str | Sequence[int]]


def write_json(
    engine: InferenceEngine, prompts: Prompts, sampling: Sequence[SamplingParams], terminal: Terminal
) -> int:
    """One object per prompt, in their order; a refused prompt has its error in its place, and the exit code is 2."""
    clock = Clock()
    outputs = engine.generate(prompts, sampling, on_error="return", on_step=clock.note_step)
    clock.stop()
    for output in outputs:
        terminal.record(_record(output))
    served = [output for output in outputs if output.error is None]
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in served)
    terminal.note(clock.summary(num_prompt_tokens, sum(len(output.token_ids) for output in served)))
    return max((output.error.exit_code for output in outputs if output.error is not None), default=0)


def write_text(
    engine: InferenceEngine, prompts: Prompts, sampling: Sequence[SamplingParams], terminal: Terminal
) -> int:
    """The text of every prompt in their order, the first unfinished one as it comes; refused prompts are reported."""
    refused = _refused(engine, prompts, sampling)
    accepted = [index for index in range(len(prompts)) if index not in refused]
    writer = TextWriter(terminal, [prompts[index] for index in accepted])
    clock = Clock()
    num_tokens = 0
    stream = engine.stream([prompts[i] for i in accepted], [sampling[i] for i in accepted]) if accepted else ()
    for chunk in stream:
        clock.note_token()
        num_tokens += len(chunk.token_ids)
        text = chunk.text if engine.tokenizer else "".join(f" {token_id}" for token_id in chunk.token_ids)
        writer.write(chunk.index, text, is_last=chunk.finish_reason is not None)
    clock.stop()
    if accepted:
        terminal.note(clock.summary(sum(_num_tokens(engine, prompts[index]) for index in accepted), num_tokens))
    for error in refused.values():
        if terminal.is_main:
            report_error(error, as_json=False, debug=False)
    return max((error.exit_code for error in refused.values()), default=0)


class TextWriter:
    """Writes the texts of several prompts one after the other, whatever order their pieces come in."""

    def __init__(self, terminal: Terminal, prompts: Prompts) -> None:
        self._terminal = terminal
        self._prompts = prompts
        self._held: list[list[str]] = [[] for _ in prompts]
        self._is_complete = [False] * len(prompts)
        self._current = 0
        self._open(0)

    def write(self, index: int, text: str, *, is_last: bool) -> None:
        """Show a piece of one prompt's text now, or when its turn comes."""
        self._held[index].append(text)
        self._is_complete[index] = is_last
        while self._current < len(self._prompts):
            pieces, self._held[self._current] = self._held[self._current], []
            self._terminal.text("".join(pieces))
            if not self._is_complete[self._current]:
                return
            self._terminal.text("\n")
            self._current += 1
            self._open(self._current)

    def _open(self, index: int) -> None:
        """Put the prompt in front of its text: on standard error, so that standard output holds the text alone."""
        if index < len(self._prompts):
            prompt = self._prompts[index]
            self._terminal.prompt(prompt if isinstance(prompt, str) else f"[{len(prompt)} token ids]")


class Clock:
    """Measures one run: its seconds, and those to the first token."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0
        self._first: float | None = None
        self._last_step = 0.0

    def note_token(self) -> None:
        """A token has come."""
        if self._first is None:
            self._first = self._now()

    def note_step(self, stats: StepStats) -> None:
        """A step has ended. The first one that decodes follows the one that gave the first token."""
        if self._first is None and stats.num_decode_tokens:
            self._first = self._last_step
        self._last_step = self._now()

    def stop(self) -> None:
        """The run has ended."""
        self._seconds = self._now()

    def summary(self, num_prompt_tokens: int, num_tokens: int) -> str:
        """One line for people."""
        first = self._seconds if self._first is None else self._first
        rate = num_tokens / self._seconds if self._seconds else 0.0
        return (
            f"done       {num_prompt_tokens} prompt tokens, {num_tokens} generated in {self._seconds:.2f} s: "
            f"{rate:.1f} tokens/s, first token after {first:.2f} s"
        )

    def _now(self) -> float:
        return time.perf_counter() - self._started


def _refused(engine: InferenceEngine, prompts: Prompts, sampling: Sequence[SamplingParams]) -> dict[int, RequestError]:
    """Prompts that the engine refuses, by index. A stream checks requests at once and queues them when it is read."""
    refused: dict[int, RequestError] = {}
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        try:
            engine.stream([prompt], [params])
        except RequestError as error:
            why = error.message.rpartition("prompts[0]: ")[2]  # without the head that a call of several prompts needs
            refused[index] = RequestError(f"prompt {index}: {why}", remedy=error.remedy)
    return refused


def _num_tokens(engine: InferenceEngine, prompt: str | Sequence[int]) -> int:
    return len(engine.tokenizer.encode(prompt)) if isinstance(prompt, str) and engine.tokenizer else len(prompt)


def _record(output: RequestOutput) -> dict[str, object]:
    if output.error is not None:
        return {"index": output.index, "error": error_object(output.error)}
    record: dict[str, object] = {
        "index": output.index,
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        record["logprobs"] = [{**asdict(each.chosen), "top": list(map(asdict, each.top))} for each in output.logprobs]
    return record
