"""How the fields of ColossalAI that hang on one another come to their fate: lengths, sampling, types."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

from inference_shardformer.config.migrate.fates import Converter, Fate, Given, Undecided
from inference_shardformer.config.templates import PLACEHOLDER, TEMPLATES

SAMPLING = "inference.sampling"
DEFAULT_LENGTH = 256
"""ColossalAI's default of max_input_len and of max_output_len."""

TEMPLATE = "a known name or a text with {input_text}; put around prompts that are text, as there"
CACHE_DTYPE = "fp8 is e4m3 here, for keys and values as they are; an attention backend must take them so"
DTYPES: Mapping[str, str] = {
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}

INPUT_LENGTH = (
    "max_input_len + max_output_len becomes the bound of prompt and generated tokens together; there the two sized the "
    "cache and only the first prompt of a call was held against its limit before others were queued (B9), here every "
    "prompt of a call is checked before any is queued"
)
OUTPUT_LENGTH = (
    "the limit of a request that names none; there every request was held to it, here a request may ask for more "
    "within max_model_len"
)
DO_SAMPLE = (
    "temperature 0 is greedy here, so False becomes 0 and True the temperature as given; there sampling was one "
    "setting of the engine that a GenerationConfig replaced for good (B12), here it is the default of requests, and a "
    "request's SamplingParams replaces it for itself alone; draws follow inference.seed and repeat from run to run"
)
NO_EFFECT_IF_GREEDY = "had no effect: do_sample was False, and it has none at temperature 0"


def convert_dtype(value: object, given: Given) -> Fate:
    """A name or a torch type as text, which may begin with `torch.`."""
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if dtype is None:
        return Fate("refused", "must be fp16, bf16 or fp32")
    return Fate("same", "torch types become their names", {"inference.dtype": dtype})


def convert_cache_dtype(value: object, given: Given) -> Fate:
    """fp8 or nothing."""
    if value is None:
        return Fate("dropped", "the default: keys and values in the compute type")
    if value != "fp8":
        return Fate("refused", "must be null or fp8")
    return Fate("renamed", CACHE_DTYPE, {"inference.cache.dtype": value})


def convert_max_input_len(value: object, given: Given) -> Fate:
    """The model length, with the other length as given or as it was by default."""
    output = given.get("max_output_len", DEFAULT_LENGTH)
    if isinstance(output, Undecided):
        return Fate("undecided", "max_model_len is its sum with max_output_len, which cannot be decided")
    return Fate("changed", INPUT_LENGTH, _model_len(value, output))


def convert_max_output_len(value: object, given: Given) -> Fate:
    """The tokens to generate; the model length too, where max_input_len does not already give it."""
    settings: dict[str, object] = {f"{SAMPLING}.max_new_tokens": value}
    if "max_input_len" not in given:
        settings |= _model_len(DEFAULT_LENGTH, value)
    return Fate("changed", OUTPUT_LENGTH, settings)


def convert_do_sample(value: object, given: Given) -> Fate:
    """Greedy or not; where it samples, the defaults of ColossalAI that ours do not share are written out."""
    if not isinstance(value, bool):
        return Fate("refused", "must be true or false")
    if not value:
        return Fate("renamed", DO_SAMPLE, {f"{SAMPLING}.temperature": 0.0})
    unsaid = {"temperature": 1.0, "top_k": 50}
    return Fate("changed", DO_SAMPLE, {f"{SAMPLING}.{name}": unsaid[name] for name in unsaid if name not in given})


def if_sampling(name: str, sentence: str, *, off: object) -> Converter:
    """A field that had an effect only with do_sample; null becomes `off`."""

    def convert(value: object, given: Given) -> Fate:
        samples = given.get("do_sample", False)
        if isinstance(samples, Undecided):
            return Fate("undecided", "takes effect only if do_sample is True, which cannot be decided")
        if not samples:
            return Fate("dropped", NO_EFFECT_IF_GREEDY)
        if name == "temperature" and value == 0:
            return Fate("refused", "0 is greedy, and do_sample asks for sampling; leave do_sample out to be greedy")
        return Fate("same", sentence, {f"{SAMPLING}.{name}": off if value is None else value})

    return convert


def convert_template(value: object, given: Given) -> Fate:
    """A known name, or a format text with a place for the prompt; doubled braces become single ones."""
    if value is None:
        return Fate("dropped", "the default: prompts are taken as they are")
    if value in TEMPLATES:
        return Fate("renamed", TEMPLATE, {"inference.prompt.template": value})
    try:
        parts = list(Formatter().parse(value)) if isinstance(value, str) else []
    except ValueError as exc:
        return Fate("refused", f"is no format text, which it had to be there: {exc}")
    fields = {name for _, name, _, _ in parts if name is not None}
    if fields != {"input_text"}:
        return Fate("refused", f"must be one of {', '.join(TEMPLATES)}, or a text with {PLACEHOLDER} as its only field")
    text = "".join(literal + (PLACEHOLDER if name is not None else "") for literal, name, _, _ in parts)
    if text == value:
        return Fate("renamed", TEMPLATE, {"inference.prompt.template": text})
    return Fate("changed", f"{TEMPLATE}; doubled braces became single ones", {"inference.prompt.template": text})


def _model_len(num_input: object, num_output: object) -> dict[str, object]:
    """The sum; a length that is no number is given as it is, for the field's own rule to refuse."""
    lengths = (num_input, num_output)
    wrong = [length for length in lengths if isinstance(length, bool) or not isinstance(length, int)]
    total = wrong[0] if wrong else sum(length for length in lengths if isinstance(length, int))
    return {"inference.max_model_len": total}
