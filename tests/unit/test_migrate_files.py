"""Files in and out: formats, both kinds of schema, and that migrating the result changes nothing."""

from __future__ import annotations

import json

import pytest
from foreign_scripts import README
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_shardformer.config.documents import read_document
from inference_shardformer.config.loader import load_config
from inference_shardformer.config.migrate.migrate import migrate_file
from inference_shardformer.config.migrate.writer import suffix_of, write_text
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import ConfigError

FOREIGN = {"max_batch_size": 3, "dtype": "bf16", "max_output_len": 9, "max_input_len": 7, "prompt_template": "llama"}
OURS = {
    "schema_version": 1,
    "inference": {
        "dtype": "bf16",
        "max_model_len": 16,
        "scheduler": {"max_num_seqs": 3},
        "sampling": {"max_new_tokens": 9},
        "prompt": {"template": "llama"},
    },
}


@pytest.fixture
def write(tmp_path):
    def run(name, text):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return run


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
@pytest.mark.parametrize("source", ["a.json", "a.yaml", "a.toml", "a.py"])
def test_every_format_to_every_format_and_stays(write, source, suffix):
    text = f"x = {FOREIGN!r}\n" if source.endswith(".py") else write_text(FOREIGN, source[1:])
    migration = migrate_file(write(source, text), suffix=suffix)
    assert migration.is_complete
    assert migration.tree == OURS
    out = write(f"out{suffix}", migration.text)
    assert read_document(out).tree == OURS
    again = migrate_file(out, suffix=suffix)
    assert again.text == migration.text
    assert again.entries == ()
    assert "nothing to migrate" in again.as_text()


def test_the_result_is_a_file_for_our_loader(write):
    out = write("out.yaml", migrate_file(write("readme.py", README)).text)
    loaded = load_config(ConfigSources(files=(out,), environ={}))
    assert loaded.inference.dtype == "fp16"
    assert loaded.inference.max_model_len == 1536
    assert loaded.inference.scheduler.max_num_seqs == 4
    assert loaded.inference.sampling.max_new_tokens == 512
    assert loaded.inference.sampling.temperature == 0.0


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "max_batch_size": st.integers(1, 999),
        "max_input_len": st.integers(1, 999),
        "max_output_len": st.integers(1, 999),
        "dtype": st.sampled_from(["fp16", "torch.bfloat16", "float32"]),
        "do_sample": st.booleans(),
        "temperature": st.floats(0.01, 1.0),
        "top_k": st.integers(1, 99) | st.none(),
        "top_p": st.floats(0.01, 1.0) | st.none(),
        "repetition_penalty": st.floats(0.1, 9.0),
        "no_repeat_ngram_size": st.integers(0, 9),
        "ignore_eos": st.booleans(),
        "prompt_template": st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"])).map(
            lambda text: text + "{input_text}"
        ),
        "use_cuda_kernel": st.booleans(),
        "tp_size": st.integers(1, 8),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES, suffix=st.sampled_from([".yaml", ".json", ".toml"]))
def test_what_is_carried_survives_our_loader_and_means_the_same(write, values, suffix):
    migration = migrate_file(write("a.json", json.dumps(values)), suffix=suffix)
    assert migration.is_complete
    out = write(f"out{suffix}", migration.text)
    found = load_config(ConfigSources(files=(out,), environ={})).inference
    sampling = found.sampling
    samples = values.get("do_sample", False)
    assert sampling.temperature == (values.get("temperature", 1.0) if samples else 0.0)
    assert sampling.top_k == ((values.get("top_k", 50) or 0) if samples else 0)
    assert sampling.top_p == ((values.get("top_p") or 1.0) if samples else 1.0)
    assert sampling.max_new_tokens == values.get("max_output_len", 64)
    assert found.prompt.template == values.get("prompt_template")
    if {"max_input_len", "max_output_len"} & values.keys():
        assert found.max_model_len == values.get("max_input_len", 256) + values.get("max_output_len", 256)
    again = migrate_file(out, suffix=suffix)
    assert (again.text, again.entries) == (migration.text, ())


def test_an_older_file_of_ours_is_upgraded_and_a_current_one_kept(write):
    old = write("old.yaml", "# mine\nshard:\n  tp_size: 2\n")
    migration = migrate_file(old)
    assert migration.text == "schema_version: 1\nshard:\n  tp_size: 2\n"
    assert [(entry.kind, entry.given) for entry in migration.entries] == [("upgraded", "schema_version 0")]
    assert (migration.version, migration.is_complete) == (0, True)
    current = "# mine\nshard: {tp_size: 2}\nschema_version: 1\n"
    kept = migrate_file(write("current.yaml", current))
    assert (kept.text, kept.entries, kept.version) == (current, (), 1)
    assert migrate_file(write("empty.yaml", "")).tree == {"schema_version": 1}


def test_plug_in_options_of_ours_are_kept(write):
    text = "[inference.attention.options.mine]\nwidth = 3\nwords = ['a', \"b\\n\"]\n"
    migration = migrate_file(write("a.toml", text), suffix=".toml")
    assert migration.is_complete
    options = read_document(write("b.toml", migration.text)).tree["inference"]["attention"]["options"]
    assert options == {"mine": {"width": 3, "words": ["a", "b\n"]}}


def test_failures_in_our_own_schema(write):
    migration = migrate_file(
        write("a.yaml", "schema_version: 1\nshard:\n  tp_sise: 2\ninference:\n  seed: -1\n  cache: 3\n  dtype: bf16\n")
    )
    assert migration.tree == {"schema_version": 1, "inference": {"dtype": "bf16"}}
    found = {(entry.kind, entry.name, entry.line): entry.sentence for entry in migration.entries}
    assert "did you mean shard.tp_size?" in found["unknown", "shard.tp_sise", 3]
    assert "at least 0" in found["refused", "inference.seed", 5]
    assert "a group of settings" in found["unknown", "inference.cache", 6]
    assert not migration.is_complete


def test_both_classes_in_one_document(write):
    tree = {"inference_config": {"tp_size": 2}, "ShardConfig": {"fp8_communication": False, "tp_size": 2}, "more": 1}
    migration = migrate_file(write("a.json", json.dumps(tree, indent=1)))
    kinds = {(entry.kind, entry.name, entry.line) for entry in migration.entries if entry.name != "dtype"}
    assert {("same", "tp_size", 3), ("unknown", "tp_size", 7), ("dropped", "fp8_communication", 6)} < kinds
    assert ("unknown", "more", 9) in kinds


def test_texts_that_look_like_numbers_stay_texts(write):
    tree = {"a": "1e5", "b": "true", "c": "null", "d": 1e-05, "e": "é\x7f\x85\u2028\n😀", "f-g": "x"}
    for suffix in (".yaml", ".json", ".toml"):
        assert read_document(write(f"a{suffix}", write_text(tree, suffix))).tree == tree


def test_errors_name_the_file(write, tmp_path):
    for name, words in (("none.py", "cannot be read"), ("none.yaml", "cannot be read"), ("x.ini", "unknown format")):
        with pytest.raises(ConfigError, match=words) as caught:
            migrate_file(str(tmp_path / name))
        assert name in caught.value.message
    (tmp_path / "bad.py").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad.py: is not UTF-8"):
        migrate_file(str(tmp_path / "bad.py"))
    with pytest.raises(ConfigError, match="needs a newer version"):
        migrate_file(write("new.yaml", "schema_version: 9\n"))
    with pytest.raises(ConfigError, match="--call"):
        migrate_file(write("a.yaml", "tp_size: 2\n"), lines=[1])
    with pytest.raises(ConfigError, match=r"--to out.py: unknown format .py"):
        suffix_of("out.py")
