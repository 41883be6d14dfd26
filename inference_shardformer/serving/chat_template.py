"""ChatTemplate: turns the messages of a conversation into the tokens of a prompt, as the model's tokenizer says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.fields import checked, missing
from inference_shardformer.serving.rules import Rule, is_list_of, is_text

_ROLES = ("system", "developer", "user", "assistant")


class ChatTokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str | None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation, up to where the assistant speaks."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" and is_text(part["text"])
    )


_MESSAGE = {
    "role": Rule(f"one of {', '.join(_ROLES)}", lambda value: value in _ROLES),
    "content": Rule(
        'text, or a list of parts {"type": "text", "text": "..."}',
        lambda value: is_text(value) or is_list_of(_is_text_part, value),
    ),
}


class ChatTemplate:
    """The chat template of a tokenizer, or another one in its place."""

    def __init__(self, tokenizer: ChatTokenizer | None, *, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def token_ids(self, messages: Sequence[object]) -> list[int]:
        """The prompt of a conversation. Takes time, so call it on a thread. Raises `ApiError`."""
        conversation = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        tokenizer = self._tokenizer
        if tokenizer is None or not (self._template or tokenizer.chat_template):
            what = "tokenizer" if tokenizer is None else "chat template"
            raise ApiError(
                400,
                f"this model has no {what}, so messages cannot become a prompt",
                remedy="use /v1/completions, or start the server with --chat-template FILE",
                code="no_chat_template",
                param="messages",
            )
        return tokenizer.encode(self._text(tokenizer, conversation), add_special_tokens=False)

    def _text(self, tokenizer: ChatTokenizer, conversation: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return tokenizer.apply_chat_template(
                conversation, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as exc:
            raise ApiError(
                400,
                f"the model's chat template refuses these messages: {exc}",
                remedy="give them in the order the template takes, mostly user and assistant in turn after a system "
                "message",
                code="chat_template",
                param="messages",
            ) from exc


def _message(message: object, place: str) -> dict[str, str]:
    """A message with its content as one text; a developer speaks as the system."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{place} is not an object", remedy='give {"role": "user", "content": "..."}', param=place)
    fields = checked(message, _MESSAGE, within=place)
    for name, rule in _MESSAGE.items():
        if name not in fields:
            raise missing(f"{place}.{name}", rule)
    content = cast(Any, fields["content"])
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    role = "system" if fields["role"] == "developer" else str(fields["role"])
    return {"role": role, "content": text}
