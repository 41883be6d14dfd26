"""Formats: what the two generating routes answer, whole and in pieces."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple
from uuid import uuid4


class Text(NamedTuple):
    """A generated text, or a piece of one; `finish_reason` is there at its end."""

    text: str
    finish_reason: str | None


class Format(ABC):
    """The shape of one answer, which has one id in all its pieces."""

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._includes_usage = includes_usage

    def whole(self, texts: Sequence[Text], usage: dict[str, int]) -> dict[str, object]:
        """The answer to a request that does not stream."""
        choices = [self._choice(text) | {"index": index} for index, text in enumerate(texts)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def opening(self, num_texts: int) -> list[dict[str, object]]:
        """The events before the first token."""
        return []

    def pieces(self, index: int, text: Text) -> list[dict[str, object]]:
        """The events for a piece of a text; none for one without anything to tell."""
        return [self._event([choice | {"index": index}]) for choice in self._deltas(text)]

    def closing(self, usage: dict[str, int]) -> list[dict[str, object]]:
        """The events after the last token."""
        return [{**self._event([]), "usage": usage}] if self._includes_usage else []

    def _event(self, choices: list[dict[str, object]]) -> dict[str, object]:
        event = {**self._head, "object": self.piece_object, "choices": choices}
        return event | {"usage": None} if self._includes_usage else event

    @abstractmethod
    def _choice(self, text: Text) -> dict[str, object]:
        """A whole text."""

    @abstractmethod
    def _deltas(self, text: Text) -> list[dict[str, object]]:
        """What a piece adds."""


class CompletionFormat(Format):
    """Answers of /v1/completions."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def _choice(self, text: Text) -> dict[str, object]:
        return {"text": text.text, "logprobs": None, "finish_reason": text.finish_reason}

    def _deltas(self, text: Text) -> list[dict[str, object]]:
        return [self._choice(text)] if text.text or text.finish_reason else []


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

    def _choice(self, text: Text) -> dict[str, object]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        return {"message": message, "logprobs": None, "finish_reason": text.finish_reason}

    def _deltas(self, text: Text) -> list[dict[str, object]]:
        deltas: list[dict[str, object]] = []
        if text.text:
            deltas.append({"delta": {"content": text.text}, "logprobs": None, "finish_reason": None})
        if text.finish_reason:
            deltas.append({"delta": {}, "logprobs": None, "finish_reason": text.finish_reason})
        return deltas
