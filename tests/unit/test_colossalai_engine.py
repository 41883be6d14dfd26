"""The drop-in InferenceEngine: what ColossalAI's takes and returns, and what happens where ColossalAI's had a trap."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import hf_greedy, save_tiny_model, tiny_model
from torch import nn
from transformers import GenerationConfig

from inference_shardformer.bridges.colossalai import InferenceConfig, InferenceEngine, launch_from_torch
from inference_shardformer.bridges.colossalai.launching import module_cuda_again, stay_on_cpu
from inference_shardformer.errors import (
    ConfigError,
    InferenceShardformerError,
    PolicyError,
    RequestError,
    UnsupportedModelError,
)

PROMPTS = ["abc", "fghij"]


class Letters:
    """A tokenizer of one token per character; `pad_token` is what a user set."""

    pad_token = "p"

    def encode(self, text, **_options):
        return [ord(letter) % 160 for letter in text]

    def decode(self, token_ids, **_options):
        return "".join(chr(token) for token in token_ids)


def config(**fields):
    return InferenceConfig(**{"dtype": "fp32", "max_input_len": 40, "max_output_len": 6, **fields})


@pytest.fixture(scope="module")
def engine():
    with InferenceEngine(tiny_model("gqa"), Letters(), config()) as made:
        yield made


@pytest.fixture(scope="module")
def expected():
    """The token ids that Hugging Face continues each prompt with."""
    model = tiny_model("gqa")
    return [hf_greedy(model, Letters().encode(prompt), 6) for prompt in PROMPTS]


def texts(expected):
    return [Letters().decode([*Letters().encode(p), *ids]) for p, ids in zip(PROMPTS, expected, strict=True)]


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate(prompts=PROMPTS),
        lambda e: e.generate(PROMPTS),
        lambda e: e.generate(None, PROMPTS),
        lambda e: e.generate([4, 9], PROMPTS),
        lambda e: e.generate(prompts_token_ids=[Letters().encode(p) for p in PROMPTS]),
        lambda e: e.generate(prompts_token_ids=[torch.tensor(Letters().encode(p)) for p in PROMPTS]),
    ],
    ids=["prompts", "by position (B11)", "second", "with ids", "token ids", "tensors"],
)
def test_texts_hold_prompt_and_completion(engine, expected, call):
    assert call(engine) == texts(expected)


def test_results_are_in_the_order_of_the_request_ids(engine, expected):
    assert engine.generate([70, 60], PROMPTS) == texts(expected)[::-1]


def test_token_ids_are_those_that_were_generated(engine, expected):
    assert engine.generate(PROMPTS, return_token_ids=True) == (texts(expected), expected)


def test_one_prompt_as_text_or_array(engine, expected):
    assert engine.generate("abc") == texts(expected)[:1]
    assert engine.generate(prompts_token_ids=np.array(Letters().encode("abc"))) == texts(expected)[:1]


def test_added_requests_are_generated_with_the_others(engine, expected):
    engine.add_request(request_ids=[900], prompts=PROMPTS[1])
    assert engine.generate([800], PROMPTS[:1]) == texts(expected)
    engine.add_request(prompts=PROMPTS[0], max_new_tokens=3)
    finished = []
    while not finished:
        finished = engine.step()
    assert list(finished[0].token_ids) == expected[0][:3]


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate(),
        lambda e: e.generate([1, 2]),
        lambda e: e.generate([1], PROMPTS),
        lambda e: e.generate([1, 1], PROMPTS),
        lambda e: e.generate("x", ["y"]),
        lambda e: e.generate(prompts=[]),
        lambda e: e.generate(prompts=[[1, 2]]),
        lambda e: e.generate(prompts_token_ids=["a"]),
        lambda e: e.generate(PROMPTS, generation_config=GenerationConfig(num_beams=4)),
        lambda e: e.generate(PROMPTS, generation_config=GenerationConfig(max_length=3)),
        lambda e: e.add_request(),
    ],
    ids=lambda _: "",
)
def test_nothing_to_do_and_what_does_not_fit_raise(engine, call):
    with pytest.raises(RequestError):
        call(engine)
    assert engine.engine.num_unfinished == 0


def test_a_request_id_that_is_queued_is_refused(engine):
    engine.add_request([77], "a")
    with pytest.raises(RequestError, match=r"request ids \[77\] are queued already"):
        engine.add_request([77], "b")
    assert len(engine.generate()) == 1


def test_one_bad_prompt_queues_none(engine):
    """B9: ColossalAI looked at the first prompt alone, and queued it before it met the second."""
    with pytest.raises(RequestError):
        engine.add_request(prompts=["ok", "x" * 300])
    with pytest.raises(RequestError):
        engine.generate(["ok", "x" * 300])
    assert engine.engine.num_unfinished == 0


def test_a_generation_config_counts_for_its_call_alone(engine, expected):
    """B10, B12: max_new_tokens is not beaten by max_length, and the engine's own sampling stays."""
    short = GenerationConfig(max_new_tokens=2)
    assert engine.generate(PROMPTS, return_token_ids=True, generation_config=short)[1] == [e[:2] for e in expected]
    assert engine.generate(PROMPTS, return_token_ids=True)[1] == expected
    length = GenerationConfig(max_length=7)  # prompt and completion together
    generated = engine.generate(PROMPTS, return_token_ids=True, generation_config=length)[1]
    assert generated == [expected[0][:4], expected[1][:2]]
    sampled = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=6)
    assert engine.generate(PROMPTS, return_token_ids=True, generation_config=sampled)[1] != expected


def test_a_path_and_everything_in_one_call(tmp_path, expected):
    save_tiny_model("gqa", tmp_path)
    tokenizer = Letters()
    with InferenceEngine(str(tmp_path), tokenizer, config(prompt_template="b{input_text}d"), True) as engine:
        assert engine.generate("c", generation_config=GenerationConfig(max_length=5))[0][:3] == "bcd"
        assert engine.generate("c", return_token_ids=True, generation_config=GenerationConfig(max_length=5))[1] == [
            hf_greedy(tiny_model("gqa"), tokenizer.encode("bcd"), 2)
        ]
    assert tokenizer.pad_token == "p"  # B15: the user's tokenizer is not touched


class FluxPipeline:
    """A model of diffusers."""


class OwnPolicy:
    """A policy of nobody's."""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((FluxPipeline(),), UnsupportedModelError),
        ((nn.Linear(2, 2), None, {"max_batch_size": 4}), ConfigError),
        ((nn.Linear(2, 2), None, None, False, OwnPolicy), PolicyError),
        (("no/such/folder/anywhere",), InferenceShardformerError),
    ],
    ids=["diffusion", "a dict", "a policy", "no folder"],
)
def test_what_cannot_be_served_is_refused_by_name(arguments, error):
    with pytest.raises(error):
        InferenceEngine(*arguments)


def test_hasattr_and_copy_do_not_fail(engine):
    """B16: ColossalAI's engine raised KeyError for unknown attributes."""
    assert not hasattr(engine, "no_such_attribute")
    with pytest.raises(ConfigError, match="speculative decoding"):
        engine.enable_spec_dec(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"beam_width": 4}, "beam_width"),
        ({"pad_input": True}, "pad_input"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype"),
        ({"use_spec_dec": True}, "use_spec_dec"),
        ({"max_batchsize": 8}, "did you mean max_batch_size"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"pp_size": 2}, "pp_size"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"prompt_template": "no place"}, "prompt_template"),
    ],
)
def test_a_configuration_is_refused_before_there_is_a_model(fields, name):
    with pytest.raises(ConfigError, match=name):
        InferenceConfig(**fields)
    with pytest.raises(ConfigError, match=name):
        InferenceConfig.from_dict(fields)


def test_fields_by_position_and_the_defaults_of_colossalai():
    made = InferenceConfig(4, 32, 64, torch.float16)
    assert made.inference.scheduler.max_num_seqs == 4
    assert made.inference.max_model_len == 96
    assert made.inference.dtype == "fp16"
    default = InferenceConfig()
    assert (default.inference.dtype, default.inference.sampling.max_new_tokens) == ("fp16", 256)
    assert default.inference.max_model_len == 512
    assert default.inference.scheduler.max_num_seqs == 8
    assert InferenceConfig(tp_size=2).shard.tp_size == 2
    assert repr(InferenceConfig(tp_size=2)) == "InferenceConfig(tp_size=2)"
    with pytest.raises(ConfigError, match="given twice"):
        InferenceConfig(4, max_batch_size=4)
    with pytest.raises(ConfigError, match="too many"):
        InferenceConfig(*range(99))


def test_launching_without_torchrun_leaves_one_rank(caplog):
    if torch.cuda.is_available():
        pytest.skip("about machines without a CUDA device")
    try:
        with caplog.at_level(logging.INFO):
            launch_from_torch(seed=7)
        assert torch.initial_seed() == 7
        layer = nn.Linear(2, 2)
        assert layer.cuda() is layer
        assert "the module stays on the CPU" in caplog.text
        assert not torch.distributed.is_initialized()
    finally:
        module_cuda_again()
    with pytest.raises((AssertionError, RuntimeError)):
        layer.cuda()
    stay_on_cpu()
    module_cuda_again()


def test_launching_refuses_the_configuration_of_training():
    with pytest.raises(ConfigError, match="configures training"):
        launch_from_torch(config={"parallel": 2})


def test_the_drop_in_needs_no_colossalai():
    """The imports for scripts work where ColossalAI is not installed, and configure no logging (B31)."""
    script = (
        "import sys, logging\n"
        "sys.modules['colossalai'] = None\n"
        "from inference_shardformer.bridges import colossalai\n"
        "from inference_shardformer.bridges.colossalai import InferenceConfig, InferenceEngine, launch_from_torch\n"
        "assert not logging.getLogger().handlers\n"
        "try:\n"
        "    colossalai.ColossalInferenceShardformer\n"
        "except RuntimeError as exc:\n"
        "    assert 'pip install --no-deps colossalai==0.5.0' in str(exc), exc\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
