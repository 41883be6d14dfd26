"""The texts of single tokens, and log-probabilities in the forms of the two generating routes."""

from __future__ import annotations

from collections.abc import Sequence

from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.logprobs import Logprob, TokenLogprobs

_BROKEN = "\ufffd"
_LEAST = -9999.0  # JSON has no infinity


class TokenTexts:
    """What a tokenizer makes of one token id alone. Remembers what it was asked for."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """The token's text, special tokens included; `token_id:N` for one that is part of a character."""
        if token_id not in self._known:
            self._known[token_id] = self._decoded(token_id)
        return self._known[token_id]

    def is_text(self, token_id: int) -> bool:
        """Whether the token has a text of its own."""
        return self.text(token_id) != _named(token_id)

    def _decoded(self, token_id: int) -> str:
        if self._tokenizer is None:
            return _named(token_id)
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return _named(token_id) if _BROKEN in str(text) else str(text)


def completion_logprobs(tokens: Sequence[TokenLogprobs], texts: TokenTexts, begin: int) -> dict[str, object]:
    """As /v1/completions has them: a list for each kind of value. The first token's text stands at `begin`."""
    offsets, offset = [], begin
    for token in tokens:
        offsets.append(offset)
        offset += len(texts.text(token.chosen.token_id)) if texts.is_text(token.chosen.token_id) else 0
    return {
        "tokens": [texts.text(token.chosen.token_id) for token in tokens],
        "token_logprobs": [_finite(token.chosen) for token in tokens],
        "top_logprobs": [{texts.text(each.token_id): _finite(each) for each in token.top} for token in tokens],
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, object]:
    """As /v1/chat/completions has them: an object for each token."""
    content = [
        _described(token.chosen, texts) | {"top_logprobs": [_described(each, texts) for each in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _described(token: Logprob, texts: TokenTexts) -> dict[str, object]:
    text = texts.text(token.token_id)
    own_bytes = list(text.encode()) if texts.is_text(token.token_id) else None
    return {"token": text, "logprob": _finite(token), "bytes": own_bytes}


def _finite(token: Logprob) -> float:
    return max(token.logprob, _LEAST)


def _named(token_id: int) -> str:
    return f"token_id:{token_id}"
