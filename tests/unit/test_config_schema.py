"""The published JSON Schema accepts what the resolver accepts, and refuses what it refuses."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schema import accepts

from inference_shardformer.config.fields import all_fields, all_groups
from inference_shardformer.config.loader import load_config, merge_layers
from inference_shardformer.config.reference import json_schema
from inference_shardformer.config.sources import ConfigSources, read_sources
from inference_shardformer.config.violations import ConfigViolations

SCHEMA = json_schema()
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 8, 1024, 1025, 3600, 3601, 65536, 65537, 2**63 - 1, 2**63),
    *(0.0, 0.5, 1.0, 100.0, 100.5, 1e300),
    *(
        "",
        "auto",
        "none",
        "on",
        "fp32",
        "fp8",
        "int8",
        "cpu",
        "sdpa",
        "prompt_lookup",
        "Q: {input_text}",
        "llama",
        "llamas",
    ),
    *({}, {"a": 1}, {"a": {}}, {"a": None}, {"a": {"b": 1}}, {"a": {"b": None}}, {"a": {"b": [1, {"c": 2}]}}),
    *({"a": {"b": {"c": 3}}}, {"a": {"": 1}}, {"": {"a": 1}}, {"block_size": 8}, {"block_size": 0}),
]
PATHS = [*all_fields(), *sorted(all_groups()), "schema_version", "shards", "inference.cache.blocks"]


def tree_of(path: str, value: object) -> dict[str, Any]:
    return reduce(lambda below, name: {name: below}, reversed(path.split(".")), value)


def resolves(folder: Any, tree: object) -> bool:
    file = folder / "a.json"
    file.write_text(json.dumps(tree))
    return not merge_layers(read_sources(ConfigSources(files=(file,), environ={}))).violations


@pytest.mark.parametrize("path", PATHS)
def test_they_agree_on_every_value_of_every_setting(tmp_path, path):
    trees = [tree_of(path, value) for value in VALUES]
    wrong = [tree for tree in trees if accepts(SCHEMA, tree) != resolves(tmp_path, tree)]
    assert not wrong
    if path in all_fields():
        assert {accepts(SCHEMA, tree) for tree in trees} == {True, False}


@settings(max_examples=150, deadline=None)
@given(chosen=st.dictionaries(st.sampled_from(list(all_fields())), st.sampled_from(VALUES), max_size=5))
def test_they_agree_on_several_settings_at_once(tmp_path_factory, chosen):
    tree: dict[str, Any] = {}
    for path, value in chosen.items():
        *groups, name = path.split(".")
        reduce(lambda below, group: below.setdefault(group, {}), groups, tree)[name] = value
    assert accepts(SCHEMA, tree) == resolves(tmp_path_factory.getbasetemp(), tree)


SUGGESTED = [
    ("inference.dtype", "BF16", "bf16"),
    ("inference.dtype", "torch.bfloat16", "bf16"),
    ("inference.dtype", "float16", "fp16"),
    ("inference.dtype", "half", "fp16"),
    ("inference.dtype", "float32", "fp32"),
    ("shard.device", "gpu", "cuda"),
    ("shard.device", "cuda:0", "cuda"),
    ("shard.tp_size", "2", "2"),
    ("shard.tp_size", 2.0, "2"),
    ("inference.weights.quantization", "INT8", "int8"),
    ("inference.strict", "yes", "true"),
    ("inference.strict", "off", "false"),
    ("inference.strict", 0, "false"),
    ("inference.scheduler.overlap", True, "on"),
    ("inference.scheduler.overlap", "no", "off"),
    ("inference.attention.profile", 123, "'123'"),
    ("inference.cache.memory_limit", "50%", "0.5 (a fraction)"),
    ("inference.cache.memory_limit", "2 GiB", "2147483648 (bytes)"),
    ("shard.timeout_s", "2min", "120.0 (seconds)"),
]
NOT_SUGGESTED = [
    ("inference.cache.memory_limit", "150%"),
    ("shard.timeout_s", "2h"),
    ("inference.cache.block_size", "2000 tokens"),
    ("inference.dtype", 16),
    ("shard.tp_size", 2.5),
    ("inference.attention.backend", None),
]


def remedy(tmp_path, path, value):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(tree_of(path, value)))
    with pytest.raises(ConfigViolations) as caught:
        load_config(ConfigSources(files=(file,), environ={}))
    (violation,) = caught.value.violations
    return violation.remedy


@pytest.mark.parametrize(("path", "value", "suggested"), SUGGESTED)
def test_a_refused_value_is_answered_by_what_it_may_mean(tmp_path, path, value, suggested):
    assert remedy(tmp_path, path, value).startswith(f"did you mean {suggested}? or leave it out")


@pytest.mark.parametrize(("path", "value"), NOT_SUGGESTED)
def test_nothing_is_suggested_that_would_be_refused(tmp_path, path, value):
    assert remedy(tmp_path, path, value).startswith("change it there")
