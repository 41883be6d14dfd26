"""What becomes of every field of ColossalAI's InferenceConfig and ShardConfig."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.migrate.document import with_tables
from inference_shardformer.config.migrate.migrate import migrate_file
from inference_shardformer.config.migrate.sources import ALL_FIELDS, POSITIONS

# Typed from ColossalAI's sources at 4f9953be: name and default, in the order of the constructor.
INFERENCE_CONFIG = {
    "max_batch_size": 8,
    "max_output_len": 256,
    "max_input_len": 256,
    "dtype": "fp16",
    "kv_cache_dtype": None,
    "prompt_template": None,
    "do_sample": False,
    "beam_width": 1,
    "prefill_ratio": 1.2,
    "pad_input": False,
    "early_stopping": False,
    "top_k": 50,
    "top_p": 1.0,
    "temperature": 1.0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "forced_eos_token_id": None,
    "ignore_eos": False,
    "use_spec_dec": False,
    "max_n_spec_tokens": 5,
    "glimpse_large_kv": False,
    "block_size": 16,
    "tp_size": 1,
    "pp_size": 1,
    "micro_batch_size": 1,
    "micro_batch_buffer_size": None,
    "use_cuda_kernel": False,
    "high_precision": False,
    "use_cuda_graph": False,
    "max_context_len_to_capture": 512,
    "enable_streamingllm": False,
    "start_token_size": 4,
    "generated_token_size": 512,
    "patched_parallelism_size": 1,
}
SHARD_CONFIG = {
    "tensor_parallel_process_group": None,
    "sequence_parallel_process_group": None,
    "pipeline_stage_manager": None,
    "enable_tensor_parallelism": True,
    "enable_all_optimization": False,
    "enable_fused_normalization": False,
    "enable_flash_attention": False,
    "enable_jit_fused": False,
    "enable_sequence_parallelism": False,
    "sequence_parallelism_mode": None,
    "parallel_output": True,
    "make_vocab_size_divisible_by": 64,
    "gradient_checkpoint_config": None,
    "extra_kwargs": {},
    "sp_axis": None,
    "pg_mesh": None,
    "inner_ring_size": None,
    "moe_dp_group": None,
    "ep_group": None,
    "fp8_communication": False,
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "migrating-configuration.md"


@pytest.fixture
def migrate(tmp_path):
    def run(**values):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(values))
        return migrate_file(str(path))

    return run


def settings_of(migration, name):
    """The settings that one field gave."""
    (entry,) = [entry for entry in migration.entries if entry.name == name]
    return entry.kind, dict(entry.settings)


@pytest.mark.parametrize(
    ("owner", "frozen"), [("InferenceConfig", INFERENCE_CONFIG), ("ShardConfig", SHARD_CONFIG)], ids=["34", "20"]
)
def test_every_field_has_a_row_in_its_place_with_its_default(owner, frozen):
    assert [(row.name, row.default) for row in POSITIONS[owner]] == list(frozen.items())


def test_the_two_classes_share_no_name():
    assert len(INFERENCE_CONFIG) == 34
    assert not INFERENCE_CONFIG.keys() & SHARD_CONFIG.keys()


@pytest.mark.parametrize("row", ALL_FIELDS.values(), ids=lambda row: row.name)
def test_every_row_says_why_and_names_paths_that_exist(row):
    assert len(row.sentence) > 15
    for path in row.becomes.split("`")[1::2]:
        if path.startswith(("inference.", "shard.")):
            assert path.split(":")[0] in all_fields()


def test_the_document_holds_the_table_as_it_is():
    text = DOCUMENT.read_text(encoding="utf-8")
    renew = "run `python -m inference_shardformer.config.migrate.document docs/migrating-configuration.md`"
    assert with_tables(text) == text, renew
    for name in ALL_FIELDS:
        assert f"| `{name}` |" in text


def test_all_defaults_migrate_without_a_failure(migrate):
    migration = migrate(**INFERENCE_CONFIG, **SHARD_CONFIG)
    assert migration.is_complete
    assert migration.tree == {
        "schema_version": 1,
        "shard": {"tp_size": 1},
        "inference": {
            "dtype": "fp16",
            "max_model_len": 512,
            "cache": {"block_size": 16},
            "scheduler": {"max_num_seqs": 8},
            "sampling": {
                "max_new_tokens": 256,
                "temperature": 0.0,
                "repetition_penalty": 1.0,
                "no_repeat_ngram_size": 0,
                "ignore_eos": False,
            },
        },
    }


SAMPLING = "inference.sampling."


@pytest.mark.parametrize(
    ("values", "name", "kind", "settings"),
    [
        ({"max_batch_size": 3}, "max_batch_size", "renamed", {"inference.scheduler.max_num_seqs": 3}),
        ({"tp_size": 2}, "tp_size", "same", {"shard.tp_size": 2}),
        ({"block_size": 32}, "block_size", "same", {"inference.cache.block_size": 32}),
        ({"dtype": "bf16"}, "dtype", "same", {"inference.dtype": "bf16"}),
        ({"dtype": "torch.half"}, "dtype", "same", {"inference.dtype": "fp16"}),
        ({"dtype": "float32"}, "dtype", "same", {"inference.dtype": "fp32"}),
        ({"dtype": "int8"}, "dtype", "refused", {}),
        ({"dtype": 16}, "dtype", "refused", {}),
        ({"max_input_len": 100}, "max_input_len", "changed", {"inference.max_model_len": 356}),
        (
            {"max_output_len": 100},
            "max_output_len",
            "changed",
            {SAMPLING + "max_new_tokens": 100, "inference.max_model_len": 356},
        ),
        ({"max_input_len": 100, "max_output_len": 9}, "max_input_len", "changed", {"inference.max_model_len": 109}),
        ({"max_input_len": 100, "max_output_len": 9}, "max_output_len", "changed", {SAMPLING + "max_new_tokens": 9}),
        ({"max_input_len": "100"}, "max_input_len", "refused", {}),
        ({"max_output_len": True}, "max_output_len", "refused", {}),
        ({"max_batch_size": 0}, "max_batch_size", "refused", {}),
        ({"max_batch_size": None}, "max_batch_size", "refused", {}),
        ({"do_sample": False}, "do_sample", "renamed", {SAMPLING + "temperature": 0.0}),
        (
            {"do_sample": True},
            "do_sample",
            "changed",
            {SAMPLING + "temperature": 1.0, SAMPLING + "top_k": 50},
        ),
        ({"do_sample": True, "temperature": 0.5}, "do_sample", "changed", {SAMPLING + "top_k": 50}),
        ({"do_sample": True, "temperature": 0.5}, "temperature", "same", {SAMPLING + "temperature": 0.5}),
        ({"do_sample": True, "temperature": 0.0}, "temperature", "refused", {}),
        ({"do_sample": True, "temperature": None}, "temperature", "same", {SAMPLING + "temperature": 1.0}),
        ({"do_sample": True, "top_k": None}, "top_k", "same", {SAMPLING + "top_k": 0}),
        ({"do_sample": True, "top_p": 0.9}, "top_p", "same", {SAMPLING + "top_p": 0.9}),
        ({"do_sample": True, "top_p": 1.5}, "top_p", "refused", {}),
        ({"do_sample": "yes"}, "do_sample", "refused", {}),
        ({"top_k": 50}, "top_k", "dropped", {}),
        ({"do_sample": False, "temperature": 0.5}, "temperature", "dropped", {}),
        ({"repetition_penalty": 1.2}, "repetition_penalty", "same", {SAMPLING + "repetition_penalty": 1.2}),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size", "same", {SAMPLING + "no_repeat_ngram_size": 3}),
        ({"ignore_eos": True}, "ignore_eos", "same", {SAMPLING + "ignore_eos": True}),
        ({"prompt_template": "llama"}, "prompt_template", "renamed", {"inference.prompt.template": "llama"}),
        (
            {"prompt_template": "Q: {input_text}\nA:"},
            "prompt_template",
            "renamed",
            {"inference.prompt.template": "Q: {input_text}\nA:"},
        ),
        (
            {"prompt_template": '{{"q": "{input_text}"}}'},
            "prompt_template",
            "changed",
            {"inference.prompt.template": '{"q": "{input_text}"}'},
        ),
        ({"prompt_template": "no place"}, "prompt_template", "refused", {}),
        ({"prompt_template": "{input_text} {other}"}, "prompt_template", "refused", {}),
        ({"prompt_template": "{input_text} {"}, "prompt_template", "refused", {}),
        ({"prompt_template": 3}, "prompt_template", "refused", {}),
        ({"use_cuda_kernel": True}, "use_cuda_kernel", "changed", {"inference.attention.backend": "auto"}),
        ({"use_cuda_graph": True}, "use_cuda_graph", "changed", {}),
        ({"high_precision": True}, "high_precision", "changed", {}),
        (
            {"enable_flash_attention": True},
            "enable_flash_attention",
            "changed",
            {"inference.attention.backend": "auto"},
        ),
        ({"enable_tensor_parallelism": False}, "enable_tensor_parallelism", "renamed", {"shard.tp_size": 1}),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype", "renamed", {"inference.cache.dtype": "fp8"}),
        ({"enable_tensor_parallelism": 0}, "enable_tensor_parallelism", "refused", {}),
        ({"tensor_parallel_process_group": 1}, "tensor_parallel_process_group", "changed", {}),
    ],
)
def test_fates(migrate, values, name, kind, settings):
    migration = migrate(**values)
    assert settings_of(migration, name) == (kind, settings)
    assert migration.is_complete == (kind != "refused")


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("kv_cache_dtype", "fp4", "null or fp8"),
        ("beam_width", 4, "B29"),
        ("beam_width", True, "B29"),
        ("pad_input", True, "packed"),
        ("forced_eos_token_id", 2, "B29"),
        ("use_spec_dec", True, "speculative"),
        ("pp_size", 2, "pipeline"),
        ("enable_streamingllm", True, "sinks"),
        ("patched_parallelism_size", 2, "diffusion"),
        ("pipeline_stage_manager", "x", "pipeline"),
        ("enable_sequence_parallelism", True, "sequence parallelism"),
        ("extra_kwargs", {"inference_only": True}, "untyped bag"),
        ("moe_dp_group", 1, "experts"),
        ("ep_group", 1, "expert"),
        ("fp8_communication", True, "fp8"),
        ("inference_gptq", True, "GPTQ"),
    ],
)
def test_what_is_not_offered_is_refused(migrate, name, value, word):
    migration = migrate(**{name: value})
    (entry,) = [entry for entry in migration.entries if entry.name == name]
    assert (entry.kind, entry.line) == ("refused", 1)
    assert word in entry.sentence
    assert not migration.is_complete


@pytest.mark.parametrize(
    ("owner", "on", "part", "value"),
    [
        ("use_spec_dec", True, "max_n_spec_tokens", 7),
        ("use_spec_dec", True, "glimpse_large_kv", True),
        ("pp_size", 2, "micro_batch_size", 4),
        ("pp_size", 2, "micro_batch_buffer_size", 2),
        ("enable_streamingllm", True, "generated_token_size", 64),
        ("enable_sequence_parallelism", True, "sequence_parallelism_mode", "ring"),
        ("enable_sequence_parallelism", True, "sp_axis", 1),
    ],
)
def test_a_part_is_dropped_alone_and_refused_with_its_owner(migrate, owner, on, part, value):
    assert settings_of(migrate(**{part: value}), part) == ("dropped", {})
    assert settings_of(migrate(**{part: value, owner: on}), part) == ("refused", {})


def test_defaults_that_differ_are_told_when_left_out(migrate):
    told = {entry.name for entry in migrate(block_size=16).entries if "not given" in entry.given}
    assert told == {"max_batch_size", "max_output_len", "dtype"}
    told = {entry.name for entry in migrate(dtype="fp16", max_output_len=1).entries if "not given" in entry.given}
    assert told == {"max_batch_size"}
    assert not [entry for entry in migrate(enable_jit_fused=True).entries if "not given" in entry.given]


def test_traps_are_told_with_the_fields_they_touch(migrate):
    sentences = {entry.name: entry.sentence for entry in migrate(max_input_len=8, do_sample=True).entries}
    assert "B9" in sentences["max_input_len"]
    assert "B12" in sentences["do_sample"]


def test_unknown_names_are_failures_with_a_suggestion(migrate):
    migration = migrate(max_batchsize=64, zzz=1)
    found = {entry.name: (entry.kind, entry.sentence) for entry in migration.entries if entry.kind == "unknown"}
    assert "from_dict ignored" in found["max_batchsize"][1]
    assert "did you mean max_batch_size?" in found["max_batchsize"][1]
    assert "remove it" in found["zzz"][1]
    assert not migration.is_complete


def test_two_fields_that_disagree_are_refused(migrate):
    migration = migrate(tp_size=2, enable_tensor_parallelism=False)
    assert settings_of(migration, "enable_tensor_parallelism") == ("refused", {})
    assert migration.tree["shard"] == {"tp_size": 2}
    assert migrate(tp_size=1, enable_tensor_parallelism=False).is_complete
