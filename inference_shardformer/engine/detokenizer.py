"""Detokenizer: text of a growing list of tokens, in whole characters; RequestText: that, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inference_shardformer.engine.sampling_params import ResolvedSampling
from inference_shardformer.engine.stop_strings import StopStrings

_BROKEN = "\ufffd"
_MAX_BROKEN = 3  # a character has at most four bytes, so at most three may stand without their end
_MAX_WINDOW = 16
_MAX_UNCLEAN_WINDOW = 64


class Tokenizer(Protocol):
    """What the engine needs of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> object:
        """Text of token ids; a real tokenizer answers a list of ids with a `str`."""


class Detokenizer:
    """Turns tokens into text piece by piece, never showing a broken character.

    Only a window of the last tokens is decoded, so a token costs the same however long the text is. The window
    starts where the text before it was whole:

        token_ids   shown long ago | shown, kept as context | held: may be half a character
                                   ^ window                 ^ clean
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._clean = 0  # tokens of the window whose text was whole
        self._num_shown = 0  # characters of the window's text that were shown

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all these tokens at once; spaces stay as the tokens have them."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def push(self, token_id: int) -> str:
        """The whole characters that this token completes."""
        self._window.append(token_id)
        text = self.decode(self._window)
        num_broken = len(text) - len(text.rstrip(_BROKEN))
        is_hopeless = num_broken > _MAX_BROKEN and len(self._window) > _MAX_UNCLEAN_WINDOW
        if is_hopeless:
            num_broken = _MAX_BROKEN
        end = len(text) - num_broken
        shown, self._num_shown = text[self._num_shown : end], max(self._num_shown, end)
        if num_broken == 0:
            self._shift()
        elif is_hopeless:
            self._restart_at(len(self._window) - _MAX_WINDOW, num_broken)
        return shown

    def flush(self) -> str:
        """What was held because it may have been half a character; nothing may be pushed afterwards."""
        return self.decode(self._window)[self._num_shown :]

    def _shift(self) -> None:
        """Move the window on, to the last place but one where the text was whole."""
        if len(self._window) >= _MAX_WINDOW and self._clean:
            self._restart_at(self._clean, 0)
        if len(self._window) >= _MAX_WINDOW // 2 and not self._clean:
            self._clean = len(self._window)

    def _restart_at(self, start: int, num_broken: int) -> None:
        rest = self._window[start:]
        text = self.decode(rest)
        if not text and self._num_shown:
            return
        self._window, self._clean, self._num_shown = rest, 0, max(0, len(text) - num_broken)


class RequestText:
    """The text of one request: decoded when somebody asks, cut before a stop text. Empty without a tokenizer.

    `token_ids` is the request's own growing list; its output begins at `start`. Stop texts are looked for in what comes
    after the first `min_new_tokens`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, token_ids: list[int], *, start: int, sampling: ResolvedSampling
    ) -> None:
        self._token_ids = token_ids
        self._start = self._end = start
        self._first_searched = start + sampling.min_new_tokens
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        )
        self._stop = StopStrings(sampling.stop)
        self._decoded = ""  # everything the detokenizer showed
        self._text = ""  # everything that may be shown
        self._num_taken = 0

    @property
    def text(self) -> str:
        """Everything that may be shown so far."""
        return self._text

    def advance(self) -> str | None:
        """Decode the tokens that came since; the stop text, once it was met."""
        while self._detokenizer is not None and self._end < len(self._token_ids) and self._stop.matched is None:
            self._show(
                self._detokenizer.push(self._token_ids[self._end]), is_searched=self._end >= self._first_searched
            )
            self._end += 1
        return self._stop.matched

    def finish(self) -> None:
        """Show what was held, once the last token is there."""
        if self._detokenizer is None or self._stop.matched is not None:
            return
        if self._end > self._start:
            self.advance()
        whole = self._detokenizer.decode(self._token_ids[self._start :])
        is_whole = whole.startswith(self._decoded)
        rest = whole[len(self._decoded) :] if is_whole else self._detokenizer.flush()
        self._show(rest, is_searched=self._end > self._first_searched, is_last=True)
        self._end = len(self._token_ids)

    def take(self) -> str:
        """What may be shown and was not taken yet."""
        self.advance()
        taken = self._text[self._num_taken :]
        self._num_taken = len(self._text)
        return taken

    def _show(self, piece: str, *, is_searched: bool, is_last: bool = False) -> None:
        self._decoded += piece
        self._text += self._stop.push(piece, is_last=is_last) if is_searched else piece
