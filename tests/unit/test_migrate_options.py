"""Migrating plug-ins' options: their own steps, reported entry by entry; idempotent; newer and unknown ones refused."""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from inference_shardformer.config.migrate.migrate import migrate_file
from inference_shardformer.config.option_steps import OptionChange, OptionsStep
from inference_shardformer.config.plugin_options import DeclaredOptions
from inference_shardformer.errors import PluginError

BACKENDS, POLICIES = "inference.attention.options", "shard.policy.options"


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    tile: int = 1


class ToyOptions(BaseModel):
    """Options of version 3."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    inner: Inner = Inner()
    blocks: int = 0
    depth: int = 0


STEPS = {
    1: OptionsStep(
        "the tile moved",
        renamed={"tyle": "inner.tile", "levels": "depth"},
        dropped={"debug": "never had an effect", "trace.file": "traces are gone"},
    ),
    2: OptionsStep(
        "sizes are blocks",
        changed={
            "depth": OptionChange("counted from 1", lambda depth: {"depth": depth - 1}),
            "tokens": OptionChange("counted tokens", lambda tokens: {"blocks": tokens // 16}),
        },
    ),
}


def lookup(field: str, name: str) -> DeclaredOptions:
    """Two plug-ins that everybody has, and one that cannot be loaded."""
    known = {"toy": (ToyOptions, 3, STEPS), "young": (Inner, 1, {}), "plain": (None, 1, {})}
    if name not in known:
        raise PluginError(f"unknown plug-in {name!r}", remedy="install it")
    model, version, steps = known[name]
    return DeclaredOptions("backend", name, f"{field}.{name}", model, version, steps)


@pytest.fixture
def migrate(tmp_path):
    """Migrate options of plug-ins, given by their field and name."""

    def run(options: dict, *, field: str = BACKENDS, suffix: str = ".yaml", **more):
        tree: dict = options
        for part in reversed(field.split(".")):
            tree = {part: tree}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"schema_version": 1, **tree, **more}, sort_keys=False))
        return migrate_file(str(path), suffix=suffix, plugins=lookup)

    return run


def options_of(migration, field: str = BACKENDS) -> dict:
    tree = yaml.safe_load(migration.text)
    for part in field.split("."):
        tree = tree[part]
    return tree


def by_kind(migration) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in migration.entries:
        found.setdefault(entry.kind, []).append(entry.given.rpartition("options.")[2])
    return found


@pytest.mark.parametrize("field", [BACKENDS, POLICIES])
def test_all_steps_are_taken_and_reported(migrate, field, tmp_path):
    old = {"toy": {"tyle": 4, "levels": 3, "debug": True, "trace": {"file": "x"}, "tokens": 64}}
    migration = migrate(old, field=field)
    assert migration.is_complete
    expected = {"toy": {"options_version": 3, "inner": {"tile": 4}, "depth": 2, "blocks": 4}}
    assert options_of(migration, field) == expected
    assert by_kind(migration) == {
        "upgraded": ["toy version 1", "toy version 2"],
        "renamed": ["toy.tyle = 4", "toy.levels = 3"],
        "dropped": ["toy.debug = true", "toy.trace.file = x"],
        "changed": ["toy.depth = 3", "toy.tokens = 64"],
    }
    entries = {entry.given.rpartition("options.")[2]: entry for entry in migration.entries}
    assert entries["toy.levels = 3"].settings == {f"{field}.toy.depth": 3}
    assert entries["toy.depth = 3"].settings == {f"{field}.toy.depth": 2}
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    assert "levels" in lines[entries["toy.depth = 3"].line - 1]  # where the user gave it, under its old name
    assert "renamed (2)" in migration.as_text()
    (tmp_path / "new.yaml").write_text(migration.text)
    again = migrate_file(str(tmp_path / "new.yaml"), plugins=lookup)
    assert (again.entries, again.text) == ((), migration.text)


def test_only_the_steps_that_are_left(migrate):
    migration = migrate({"toy": {"options_version": 2, "depth": 3}})
    assert options_of(migration) == {"toy": {"options_version": 3, "depth": 2}}
    assert by_kind(migration) == {"upgraded": ["toy version 2"], "changed": ["toy.depth = 3"]}


def test_options_of_the_first_version_only_get_their_version(migrate):
    migration = migrate({"young": {"tile": 2}})
    assert options_of(migration) == {"young": {"options_version": 1, "tile": 2}}
    assert by_kind(migration) == {"upgraded": ["young without a version"]}


def test_nothing_but_the_options_changes(migrate):
    migration = migrate({"toy": {"tyle": 4}}, shard={"tp_size": 2})
    assert yaml.safe_load(migration.text)["shard"] == {"tp_size": 2}
    assert migrate({"toy": {}}).entries == ()


@pytest.mark.parametrize(
    ("options", "kind", "name", "said"),
    [
        ({"toy": {"options_version": 4, "x": 1}}, "refused", "toy.options_version", "at most 3"),
        ({"toy": {"options_version": "2"}}, "refused", "toy.options_version", "an integer from 1 to 3"),
        ({"toy": {"options_version": 0}}, "refused", "toy.options_version", "an integer from 1 to 3"),
        ({"toy": {"bloks": 1}}, "unknown", "toy.bloks", "did you mean"),
        ({"toy": {"options_version": 3, "tyle": 1}}, "unknown", "toy.tyle", "the name of an option of backend toy"),
        ({"toy": {"tokens": "many"}}, "refused", "toy.tokens", "cannot convert this value: TypeError"),
        ({"toy": {"levels": 3, "depth": 1}}, "refused", "toy.levels", "becomes inference.attention.options.toy.depth"),
        ({"toy": {"tyle": "wide"}}, "refused", "toy.inner.tile", "integer"),
        ({"absent": {"x": 1}}, "refused", "absent.x", "unknown plug-in 'absent'"),
        ({"plain": {"x": 1}}, "refused", "plain.x", "takes no options"),
    ],
)
def test_failures_are_named_and_left_out(migrate, options, kind, name, said):
    migration = migrate({**options, "young": {"options_version": 1, "tile": 2}})
    assert not migration.is_complete
    (entry,) = [entry for entry in migration.entries if entry.kind in ("refused", "unknown")]
    assert (entry.kind, entry.name) == (kind, f"{BACKENDS}.{name}")
    assert said in entry.sentence
    kept = options_of(migration)
    assert kept["young"] == {"options_version": 1, "tile": 2}
    assert "x" not in kept.get("toy", {})


def test_other_formats_hold_the_same(migrate):
    assert json.loads(migrate({"toy": {"tyle": 4}}, suffix=".json").text)["inference"]["attention"]["options"] == {
        "toy": {"options_version": 3, "inner": {"tile": 4}}
    }
