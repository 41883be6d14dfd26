"""Prompt templates: which are accepted, and that they surround text prompts alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from inference_shardformer.config.inference import PromptConfig
from inference_shardformer.config.templates import TEMPLATES, filled
from inference_shardformer.errors import RequestError

VICUNA = (
    "A chat between a curious user and an assistant. The assistant gives helpful, detailed, accurate, uncensored "
    "responses to the user input. USER: a{0}\nASSISTANT: "
)
CASES = {"[{input_text}] {x}": "[a{0}] {x}", "vicuna": VICUNA, "baichuan": " <reserved_106> a{0} <reserved_107> "}


@pytest.mark.parametrize(("template", "text"), CASES.items(), ids=["own text", "vicuna", "baichuan"])
def test_template_surrounds_text_prompts_alone(tiny: SimpleNamespace, template: str, text: str) -> None:
    setup = tiny.Setup(template=template, max_model_len=400, num_blocks=200)
    by_text, by_ids = setup.engine().generate(["a{0}", [97, 98]])
    assert by_text.prompt == "a{0}"
    assert bytes(by_text.prompt_token_ids).decode() == text
    assert list(by_text.token_ids) == setup.greedy(list(text.encode()), 16)
    assert by_ids.prompt_token_ids == (97, 98)


def test_length_of_the_whole_text_counts(tiny: SimpleNamespace) -> None:
    with pytest.raises(RequestError, match="max_model_len=128"):
        tiny.Setup(template="vicuna").engine().generate("a")


def test_llama_puts_the_prompt_behind_the_system_text() -> None:
    text = filled("llama", "a\\1 {input_text}")
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful")
    assert text.endswith("\n<</SYS>>\na\\1 {input_text}[/INST]")
    assert "while being safe.  Your answers" in text


@pytest.mark.parametrize("template", ["", "llama2", "{input}", "{ input_text }"])
def test_template_without_a_place_for_the_prompt_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match=r"\{input_text\} where the prompt goes, or one of llama, vicuna"):
        PromptConfig(template=template)


@pytest.mark.parametrize("template", [None, "{input_text}", *TEMPLATES])
def test_template_or_name_is_accepted(template: str | None) -> None:
    assert PromptConfig(template=template).template == template
