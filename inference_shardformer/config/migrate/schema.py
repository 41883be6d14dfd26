"""Versions of our configuration files: the key that names one, the check of it, and the steps from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from inference_shardformer.errors import ConfigError

SCHEMA_KEY = "schema_version"
SCHEMA_VERSION = 1
"""The version that everything serialised carries. A file without the key is read as the current version."""

Tree = dict[object, object]


class SchemaStep(NamedTuple):
    """The way from one version to the next: what changes, in words, and the change itself on a copy of the tree."""

    sentence: str
    apply: Callable[[Tree], Tree]


class Upgrade(NamedTuple):
    """A tree of the current version, the version it had, and the sentence of every step it took."""

    tree: Tree
    version: int
    sentences: tuple[str, ...]


def schema_version(tree: Mapping[object, object], where: str, *, current: int = SCHEMA_VERSION) -> int | None:
    """The version that a file names, `None` without one. Raises ConfigError for no integer and for a newer version."""
    version = tree.get(SCHEMA_KEY)
    if version is None and SCHEMA_KEY not in tree:
        return None
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ConfigError(
            f"{where}: {SCHEMA_KEY} = {version!r} is not an integer from 0 to {current}",
            remedy=f"write {SCHEMA_KEY}: {current}",
        )
    if version > current:
        raise ConfigError(
            f"{where}: {SCHEMA_KEY} = {version} needs a newer version of inference-shardformer; "
            f"this one reads up to {current}",
            remedy="upgrade inference-shardformer, or write the file for this version",
        )
    return version


def check_schema_version(tree: Mapping[object, object], where: str) -> Tree:
    """The settings of a file without its version. Raises ConfigError unless this version can read them as they are.

    `where` names the file in the error. A file that names no version is read as the current one.
    """
    version = schema_version(tree, where)
    if version is not None and version < SCHEMA_VERSION:
        raise ConfigError(
            f"{where}: {SCHEMA_KEY} = {version} is older than the current {SCHEMA_VERSION}",
            remedy="inference-shardformer migrate FILE --to FILE",
        )
    return {key: value for key, value in tree.items() if key != SCHEMA_KEY}


def upgrade(
    tree: Mapping[object, object],
    where: str,
    *,
    steps: Mapping[int, SchemaStep] | None = None,
    current: int = SCHEMA_VERSION,
) -> Upgrade:
    """Take every step from the version of `tree` (0 without the key) to the current one; `tree` stays as it is."""
    steps = SCHEMA_STEPS if steps is None else steps
    version = schema_version(tree, where, current=current) or 0
    settings = {key: value for key, value in tree.items() if key != SCHEMA_KEY}
    sentences = []
    for number in range(version, current):
        settings = steps[number].apply(settings)
        sentences.append(f"{number} -> {number + 1}: {steps[number].sentence}")
    return Upgrade({SCHEMA_KEY: current, **settings}, version, tuple(sentences))


def _same(tree: Tree) -> Tree:
    return dict(tree)


SCHEMA_STEPS: Mapping[int, SchemaStep] = {
    0: SchemaStep(f"the file names its version with {SCHEMA_KEY}; the settings are the same", _same),
}
"""The step that leaves each version, by that version."""
