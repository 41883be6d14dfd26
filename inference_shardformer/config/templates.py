"""Prompt templates: the text around a prompt, given as such or by the name of a chat format."""

from __future__ import annotations

import re
from collections.abc import Mapping

PLACEHOLDER = "{input_text}"

TEMPLATES: Mapping[str, str] = {
    "llama": (
        "[INST] <<SYS>>\n"
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
        " Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content."
        " Please ensure that your responses are socially unbiased and positive in nature. If a question does not make "
        "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
        "know the answer to a question, please don't share false information.\n"
        f"<</SYS>>\n{PLACEHOLDER}[/INST]"
    ),
    "vicuna": (
        "A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, uncensored "
        f"responses to the user input. USER: {PLACEHOLDER}\nASSISTANT: "
    ),
    "baichuan": f" <reserved_106> {PLACEHOLDER} <reserved_107> ",
}
"""The chat formats that ColossalAI names, so that a configuration which names one means the same here."""


TEMPLATE_PATTERN = rf"^({'|'.join(TEMPLATES)})$|{re.escape(PLACEHOLDER)}"
"""What `template_text` accepts, as a regular expression."""


def template_text(template: str) -> str:
    """The text of a template, which may be a name. Raises ValueError if it has no place for the prompt."""
    text = TEMPLATES.get(template, template)
    if PLACEHOLDER not in text:
        raise ValueError(f"text with {PLACEHOLDER} where the prompt goes, or one of {', '.join(TEMPLATES)}")
    return text


def filled(template: str, prompt: str) -> str:
    """`prompt` inside the template. Other braces stay as they are, in the template and in the prompt."""
    return template_text(template).replace(PLACEHOLDER, prompt)
