"""Formats: what the two generating routes answer, whole and in pieces."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple
from uuid import uuid4

from inference_shardformer.engine.logprobs import TokenLogprobs
from inference_shardformer.serving.token_texts import TokenTexts, chat_logprobs, completion_logprobs


class Text(NamedTuple):
    """A generated text, or a piece of one: `finish_reason` at its end, `logprobs` where they were asked for."""

    text: str
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def with_piece(self, piece: Text) -> Text:
        """This text and what comes behind it."""
        logprobs = None if piece.logprobs is None else (*(self.logprobs or ()), *piece.logprobs)
        return Text(self.text + piece.text, piece.finish_reason, logprobs)


class Format(ABC):
    """The shape of one answer, which has one id in all its pieces."""

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, model: str, *, tokens: TokenTexts, includes_usage: bool = False) -> None:
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._includes_usage = includes_usage
        self._tokens = tokens
        self._num_told: dict[int, int] = {}

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, object]:
        """The answer to a request that does not stream."""
        choices = [self._choice(text, 0) | {"index": index} for index, text in enumerate(texts)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def opening(self, num_texts: int) -> list[dict[str, object]]:
        """The events before the first token."""
        return []

    def pieces(self, index: int, text: Text) -> list[dict[str, object]]:
        """The events for a piece of a text; none for one without anything to tell."""
        begin = self._num_told.get(index, 0)
        self._num_told[index] = begin + len(text.text)
        return [self._event([choice | {"index": index}]) for choice in self._deltas(text, begin)]

    def closing(self, usage: dict[str, int]) -> list[dict[str, object]]:
        """The events after the last token."""
        return [{**self._event([]), "usage": usage}] if self._includes_usage else []

    def _event(self, choices: list[dict[str, object]]) -> dict[str, object]:
        event = {**self._head, "object": self.piece_object, "choices": choices}
        return event | {"usage": None} if self._includes_usage else event

    @abstractmethod
    def _choice(self, text: Text, begin: int) -> dict[str, object]:
        """A whole text, or a piece that begins after so many characters."""

    @abstractmethod
    def _deltas(self, text: Text, begin: int) -> list[dict[str, object]]:
        """What a piece adds."""


class CompletionFormat(Format):
    """Answers of /v1/completions."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def _choice(self, text: Text, begin: int) -> dict[str, object]:
        logprobs = None if text.logprobs is None else completion_logprobs(text.logprobs, self._tokens, begin)
        return {"text": text.text, "logprobs": logprobs, "finish_reason": text.finish_reason}

    def _deltas(self, text: Text, begin: int) -> list[dict[str, object]]:
        return [self._choice(text, begin)] if text.text or text.finish_reason or text.logprobs else []


class ChatFormat(Format):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def opening(self, num_texts: int) -> list[dict[str, object]]:
        """Who speaks, for every text."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(num_texts)
        ]

    def _choice(self, text: Text, begin: int) -> dict[str, object]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(text), "finish_reason": text.finish_reason}

    def _logprobs(self, text: Text) -> dict[str, object] | None:
        return None if text.logprobs is None else chat_logprobs(text.logprobs, self._tokens)

    def _deltas(self, text: Text, begin: int) -> list[dict[str, object]]:
        deltas: list[dict[str, object]] = []
        if text.text or text.logprobs:
            delta = {"content": text.text}
            deltas.append({"delta": delta, "logprobs": self._logprobs(text), "finish_reason": None})
        if text.finish_reason:
            deltas.append({"delta": {}, "logprobs": None, "finish_reason": text.finish_reason})
        return deltas
