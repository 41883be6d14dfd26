"""ColossalAI's configuration in Python files: found by parsing, never by running."""

from __future__ import annotations

import textwrap

import pytest
from foreign_scripts import ARGUMENTS, README

from inference_shardformer.config.migrate.migrate import migrate_file
from inference_shardformer.errors import ConfigError


@pytest.fixture
def migrate(tmp_path):
    def run(text, **kwargs):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return migrate_file(str(path), **kwargs)

    return run


def kinds(migration):
    return {(entry.kind, entry.name, entry.line) for entry in migration.entries}


def test_the_example_of_the_readme(migrate):
    migration = migrate(README)
    assert migration.is_complete
    assert migration.tree == {
        "schema_version": 1,
        "inference": {
            "dtype": "fp16",
            "max_model_len": 1536,
            "attention": {"backend": "auto"},
            "scheduler": {"max_num_seqs": 4},
            "sampling": {"max_new_tokens": 512},
        },
    }
    assert kinds(migration) == {
        ("same", "dtype", 12),
        ("renamed", "max_batch_size", 13),
        ("changed", "max_input_len", 14),
        ("changed", "max_output_len", 15),
        ("changed", "use_cuda_kernel", 16),
        ("changed", "generate", 20),
    }


def test_a_script_that_takes_its_values_from_the_command_line(migrate):
    migration = migrate(ARGUMENTS)
    assert not migration.is_complete
    assert {entry for entry in kinds(migration) if entry[0] in ("undecided", "dropped")} == {
        ("undecided", "dtype", 8),
        ("undecided", "max_batch_size", 9),
        ("undecided", "max_input_len", 10),  # its sum with a length that is undecided
        ("undecided", "max_output_len", 11),
        ("dropped", "prefill_ratio", 12),
        ("dropped", "start_token_size", 15),
        ("dropped", "generated_token_size", 16),
    }
    assert migration.tree == {
        "schema_version": 1,
        "inference": {"attention": {"backend": "auto"}, "cache": {"block_size": 16}},
    }
    told = {(entry.name, entry.line): entry.sentence for entry in migration.entries if entry.kind == "changed"}
    assert "B10" in told["GenerationConfig", 19]
    assert "B12" in told["generation_config", 20]
    assert "policy=" in told["model_policy", 18]
    assert "speculative" in told["enable_spec_dec", 21]
    assert "B9" in told["add_request", 22]
    assert any("B11" in entry.sentence and entry.line == 20 for entry in migration.entries)


def test_nothing_of_the_file_is_run(migrate, tmp_path):
    ran = tmp_path / "ran"
    effect = f"open({str(ran)!r}, 'w').close()"
    migration = migrate(
        f"""
        {effect}
        raise SystemExit({effect})
        class InferenceConfig: x = {effect}
        InferenceConfig(max_batch_size=3, dtype={effect}, **{effect})
        """
    )
    assert not ran.exists()
    assert ("renamed", "max_batch_size", 5) in kinds(migration)
    assert ("undecided", "dtype", 5) in kinds(migration)


@pytest.mark.parametrize(
    "text",
    [
        "InferenceConfig(max_batch_size=3)",
        "InferenceConfig(3)",
        "from colossalai.inference import InferenceConfig\nInferenceConfig(max_batch_size=3)",
        "from colossalai.inference.config import InferenceConfig as C\nx = C(max_batch_size=3)",
        "import colossalai\nf(colossalai.inference.InferenceConfig(max_batch_size=3))",
        "import colossalai.inference as ci\nci.InferenceConfig(max_batch_size=3)",
        "InferenceConfig.from_dict({'max_batch_size': 3})",
        "InferenceConfig.from_dict(config_dict={'max_batch_size': 3})",
        "InferenceConfig(**{'max_batch_size': 3})",
        "InferenceConfig(**{**{'max_batch_size': 3}})",
        "settings = {'max_batch_size': 3}\nInferenceConfig(**settings)",
        "settings: dict = {'max_batch_size': 3}\nInferenceConfig.from_dict(settings)",
        "settings = {'max_batch_size': 3}",
        "settings = {'max_batch_size': 2, 'max_batch_size': 3}",
        "def f():\n    if 1:\n        return InferenceConfig(max_batch_size=3)",
        "from inference_shardformer import InferenceConfig as Ours\n"
        "from colossalai.inference import InferenceConfig\nOurs()\nInferenceConfig(max_batch_size=3)",
    ],
)
def test_ways_to_write_a_configuration(migrate, text):
    migration = migrate(text)
    assert migration.tree["inference"] == {"scheduler": {"max_num_seqs": 3}}
    assert migration.is_complete


@pytest.mark.parametrize(
    ("written", "dtype"),
    [("torch.float16", "fp16"), ("bfloat16", "bf16"), ("t.half", "fp16"), ("'fp32'", "fp32"), ("torch.int8", None)],
)
def test_torch_types(migrate, written, dtype):
    migration = migrate(f"import torch, torch as t\nfrom torch import bfloat16\nInferenceConfig(dtype={written})")
    assert migration.tree.get("inference", {}).get("dtype") == dtype
    assert migration.is_complete == (dtype is not None)


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("n = 3\nInferenceConfig(max_batch_size=n)", "max_batch_size", 2),
        ("import os\nInferenceConfig(dtype=os.environ['D'])", "dtype", 2),
        ("InferenceConfig(*values)", "*values", 1),
        ("InferenceConfig(**options)", "options", 1),
        ("InferenceConfig.from_dict(load())", "load()", 1),
        ("InferenceConfig(**{key: 3})", "key", 1),
        ("s = {'tp_size': 2}\ns['tp_size'] = 3\nInferenceConfig(**s)", "s", 3),
        ("s = {'tp_size': 2}\ns.update(x)\nInferenceConfig(**s)", "s", 3),
        ("s = {'tp_size': 2}\ndef f(s):\n    InferenceConfig(**s)", "s", 3),
        ("c = InferenceConfig()\nc.tp_size = 2", "tp_size", 2),
        ("c = InferenceConfig()\nsetattr(c, 'tp_size', 2)", "setattr(c, 'tp_size', 2)", 2),
        ("from dataclasses import replace\nc = InferenceConfig()\nreplace(c, tp_size=2)", "replace(c, tp_size=2)", 3),
        ("InferenceConfig(do_sample=x, top_p=0.5)", "top_p", 1),
        ("ShardConfig(pipeline_stage_manager=manager)", "pipeline_stage_manager", 1),
    ],
)
def test_what_only_the_running_program_knows_is_undecided(migrate, text, name, line):
    migration = migrate(text)
    assert ("undecided", name, line) in kinds(migration)
    assert not migration.is_complete


def test_an_undecided_process_group_is_told(migrate):
    migration = migrate("ShardConfig(tensor_parallel_process_group=group, parallel_output=flag)")
    assert kinds(migration) == {
        ("changed", "tensor_parallel_process_group", 1),
        ("dropped", "parallel_output", 1),
    }
    assert "process_group=group" in migration.entries[0].sentence


@pytest.mark.parametrize(
    ("text", "kind", "name", "words"),
    [
        (
            "InferenceConfig(max_batchsize=3)",
            "unknown",
            "max_batchsize",
            "takes no such argument; did you mean max_batch",
        ),
        ("InferenceConfig(enable_jit_fused=True)", "unknown", "enable_jit_fused", "InferenceConfig takes no such"),
        ("InferenceConfig.from_dict({'batch': 3})", "unknown", "batch", "from_dict ignored"),
        ("InferenceConfig(3, max_batch_size=4)", "refused", "max_batch_size", "a second time (first on line 1)"),
        (f"InferenceConfig({', '.join('1' * 35)})", "undecided", "1", "which fields"),
    ],
)
def test_arguments_that_cannot_be(migrate, text, kind, name, words):
    (entry,) = [entry for entry in migrate(text).entries if (entry.kind, entry.name) == (kind, name)]
    assert words in entry.sentence


def test_both_classes_of_one_file_go_together(migrate):
    migration = migrate(
        """
        config = InferenceConfig(tp_size=2)
        shard = ShardConfig(enable_flash_attention=True, enable_sequence_parallelism=False)
        """
    )
    assert migration.tree["shard"] == {"tp_size": 2}
    assert migration.tree["inference"] == {"attention": {"backend": "auto"}}
    assert migration.origin == "ColossalAI's InferenceConfig on line 2 and ShardConfig on line 3"


SEVERAL = "a = InferenceConfig(\n  max_batch_size=1,\n)\nb = InferenceConfig(max_batch_size=2)\nShardConfig()\n"


def test_several_of_one_class_need_a_line(migrate):
    with pytest.raises(ConfigError, match="InferenceConfig on line 1, InferenceConfig on line 4") as caught:
        migrate(SEVERAL)
    assert "--call LINE" in caught.value.remedy
    assert migrate(SEVERAL, lines=[2]).tree["inference"]["scheduler"]["max_num_seqs"] == 1
    assert migrate(SEVERAL, lines=[4]).tree["inference"]["scheduler"]["max_num_seqs"] == 2
    assert "ShardConfig on line 5" in migrate(SEVERAL, lines=[4]).origin
    with pytest.raises(ConfigError, match="several"):
        migrate(SEVERAL, lines=[1, 4])
    with pytest.raises(ConfigError, match="--call 9: no configuration"):
        migrate(SEVERAL, lines=[9])


def test_two_dictionaries_need_a_line(migrate):
    text = "a = {'max_batch_size': 1}\nb = {'max_batch_size': 2}\nc = {'other': 1}\n"
    with pytest.raises(ConfigError, match="settings on line 1, settings on line 2"):
        migrate(text)
    assert migrate(text, lines=[2]).tree["inference"]["scheduler"]["max_num_seqs"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "script.py:1: cannot be parsed as Python"),
        ("x = 1\0", "cannot be parsed as Python"),
        ("print(1)", "holds no configuration of ColossalAI's"),
        ("from inference_shardformer import InferenceConfig\nInferenceConfig()", "holds no configuration"),
        ("from vllm import InferenceConfig\nInferenceConfig(tp_size=2)", "holds no configuration"),
        (f"InferenceConfig(tp_size={'+'.join('1' * 9000)})", "nested too deeply"),
        (f"InferenceConfig(tp_size={'-' * 20000}1)", "nested too deeply"),
    ],
)
def test_files_without_a_configuration_to_read(migrate, text, words):
    with pytest.raises(ConfigError) as caught:
        migrate(text)
    assert words in caught.value.message
    assert caught.value.remedy


def test_calls_of_other_objects_are_no_traps(migrate):
    migration = migrate(
        """
        model.generate(ids, generation_config=GenerationConfig(max_length=3))
        InferenceConfig(dtype="fp16", max_batch_size=1, max_output_len=1)
        """
    )
    assert {entry.name for entry in migration.entries} == {"dtype", "max_batch_size", "max_output_len"}


def test_an_engine_made_from_a_path_trusted_its_code(migrate):
    migration = migrate("config = InferenceConfig()\nself.engine = InferenceEngine('path', None, config)\n")
    assert any("trust_remote_code" in entry.sentence and entry.line == 2 for entry in migration.entries)
