"""Versions of our schema: named, checked, upgraded step by step; a newer one is refused."""

from __future__ import annotations

import pytest

from inference_shardformer.config.migrate.schema import (
    SCHEMA_STEPS,
    SCHEMA_VERSION,
    SchemaStep,
    check_schema_version,
    upgrade,
)
from inference_shardformer.errors import ConfigError


def test_there_is_a_step_from_every_version_to_the_next():
    assert list(SCHEMA_STEPS) == list(range(SCHEMA_VERSION))


def test_a_file_without_a_version_gets_the_key():
    tree = {"shard": {"tp_size": 2}}
    upgraded = upgrade(tree, "run.yaml")
    assert list(upgraded.tree.items()) == [("schema_version", 1), ("shard", {"tp_size": 2})]
    assert upgraded.version == 0
    assert upgraded.sentences == ("0 -> 1: the file names its version with schema_version; the settings are the same",)
    assert tree == {"shard": {"tp_size": 2}}
    assert upgrade(upgraded.tree, "run.yaml") == (upgraded.tree, 1, ())


def test_steps_run_in_order_from_the_version_of_the_file():
    def step(name):
        return SchemaStep(f"adds {name}", lambda tree: {**tree, "order": [*tree.get("order", []), name]})

    steps = {0: step("a"), 1: step("b"), 2: step("c")}
    assert upgrade({}, "f", steps=steps, current=3) == (
        {"schema_version": 3, "order": ["a", "b", "c"]},
        0,
        ("0 -> 1: adds a", "1 -> 2: adds b", "2 -> 3: adds c"),
    )
    assert upgrade({"schema_version": 2}, "f", steps=steps, current=3).tree["order"] == ["c"]


@pytest.mark.parametrize("version", ["1", 1.0, True, None, -1, [1]])
@pytest.mark.parametrize("read", [check_schema_version, upgrade])
def test_a_version_is_an_integer(version, read):
    with pytest.raises(ConfigError, match=r"run.yaml: schema_version = .* is not an integer from 0 to 1"):
        read({"schema_version": version}, "run.yaml")


@pytest.mark.parametrize("read", [check_schema_version, upgrade])
def test_a_newer_version_is_refused_by_name(read):
    with pytest.raises(ConfigError) as caught:
        read({"schema_version": 2}, "run.yaml")
    assert "run.yaml: schema_version = 2 needs a newer version of inference-shardformer" in caught.value.message
    assert "upgrade" in caught.value.remedy


def test_the_loader_gets_the_settings_alone():
    tree = {"schema_version": 1, "shard": {}}
    assert check_schema_version(tree, "f") == {"shard": {}}
    assert check_schema_version({"shard": {}}, "f") == {"shard": {}}
    assert tree["schema_version"] == 1
    with pytest.raises(ConfigError, match="older than the current 1") as caught:
        check_schema_version({"schema_version": 0}, "f")
    assert "migrate FILE" in caught.value.remedy
