"""What is generated from the models is current, complete, and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_shardformer.cli.main import build_parser
from inference_shardformer.cli.parser import ENGINE_FLAGS, GENERATE_FLAGS
from inference_shardformer.config.fields import ROOTS, all_fields
from inference_shardformer.config.mutability import mutability_of
from inference_shardformer.config.reference import generated_files, json_schema
from inference_shardformer.config.units import converted

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()


def schema_of(path: str) -> dict:
    node = SCHEMA
    for name in path.split("."):
        node = node["properties"][name]
    return node


@pytest.mark.parametrize("name", ["docs/configuration.md", "docs/config.schema.json"])
def test_generated_files_are_current(name):
    expected = generated_files(ROOT)[name]
    assert (ROOT / name).read_text(encoding="utf-8") == expected, "run: python scripts/generate_docs.py"


@pytest.mark.parametrize("field", all_fields().values(), ids=list(all_fields()))
def test_every_field_is_described_everywhere(field):
    assert field.description.endswith(".")
    assert field.rule
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert field.variable in page
    assert field.description in page
    schema = schema_of(field.path)
    assert schema["description"] == field.description
    assert schema["x-mutability"] == mutability_of(field.path)
    assert schema.get("x-unit", "") == field.unit
    assert schema.get("x-flag", "") == field.flag
    if not field.is_open:
        assert schema["default"] == field.default


def test_every_field_declares_its_mutability():
    for root, model in ROOTS.items():
        stack = [(root, model)]
        while stack:
            prefix, group = stack.pop()
            for name, info in group.model_fields.items():
                path = f"{prefix}.{name}"
                if path in all_fields():
                    assert "mutability" in (info.json_schema_extra or {}), path
                else:
                    stack.append((path, info.annotation))


def test_groups_refuse_names_they_do_not_know():
    groups = {path.rpartition(".")[0] for path in all_fields()}
    for group in groups:
        assert schema_of(group)["additionalProperties"] is False, group
    assert SCHEMA["additionalProperties"] is False
    assert "$ref" not in json.dumps(SCHEMA)
    assert "$defs" not in SCHEMA


def test_bounds_reach_the_schema():
    assert schema_of("inference.cache.block_size")["anyOf"][0]["maximum"] == 1024
    assert schema_of("shard.timeout_s")["exclusiveMinimum"] == 0
    assert schema_of("shard.device")["enum"] == ["auto", "cpu", "cuda"]


def test_the_flags_of_the_command_line_are_those_of_the_fields():
    declared = {field.flag: field.path for field in all_fields().values() if field.flag}
    assert {flag.name: flag.path for flag in (*ENGINE_FLAGS, *GENERATE_FLAGS)} == declared
    build_parser()


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("2GiB", "bytes, or a fraction", 2 * 2**30),
        ("1.5 kB", "bytes, or a fraction", 1500),
        ("10M", "bytes, or a fraction", 10 * 2**20),
        ("50%", "bytes, or a fraction", 0.5),
        ("90%", "probability", 0.9),
        ("2min", "seconds", 120),
        ("250ms", "seconds", 0.25),
        ("1 token", "tokens", 1),
        ("3 blocks", "blocks", 3),
        ("3 blocks", "tokens", None),
        ("2GiB", "tokens", None),
        ("50%", "tokens", None),
        ("many", "tokens", None),
        ("12", "tokens", None),
    ],
)
def test_units_behind_numbers_are_understood(text, unit, number):
    assert converted(text, unit) == number
