"""migrate_file: one file of a foreign or an older configuration becomes the current schema, with a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inference_shardformer.config.documents import Document
from inference_shardformer.config.fields import ROOTS
from inference_shardformer.config.layers import flatten, nest
from inference_shardformer.config.loader import merge_layers
from inference_shardformer.config.migrate.convert import convert
from inference_shardformer.config.migrate.fates import Kind
from inference_shardformer.config.migrate.options import upgrade_options
from inference_shardformer.config.migrate.reader import read_file
from inference_shardformer.config.migrate.report import Migration
from inference_shardformer.config.migrate.schema import SCHEMA_KEY, SCHEMA_VERSION, Tree, upgrade
from inference_shardformer.config.migrate.sources import Entry
from inference_shardformer.config.migrate.writer import write_text
from inference_shardformer.config.option_steps import OPTIONS_KEY
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.plugin_options import OptionsLookup, check_plugins
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import Violation


def migrate_file(
    name: str, *, suffix: str = ".yaml", lines: Sequence[int] = (), plugins: OptionsLookup | None = None
) -> Migration:
    """Migrate one file without running or writing anything; `suffix` is the format of the new text.

    `lines` choose among several calls in a Python file. `plugins` tells what plug-ins declare of their options; without
    it these are carried as they are. Raises ConfigError where the file cannot be read, holds no configuration, or needs
    a newer version. What is refused, unknown or undecided is in the entries.
    """
    found = read_file(name, lines=lines)
    if found.ours is not None:
        return _upgraded(found.ours, suffix, plugins)
    tree, entries = convert(found.sources)
    tree = {SCHEMA_KEY: SCHEMA_VERSION, **tree}
    origin = f"ColossalAI's {' and '.join(str(source) for source in found.sources)}"
    return Migration(name, origin, None, tree, (*entries, *found.traps), write_text(tree, suffix))


def _upgraded(document: Document, suffix: str, plugins: OptionsLookup | None) -> Migration:
    """A file of our own schema. One that is current and keeps its format stays as it is, comments included."""
    upgraded = upgrade(document.tree, document.name)
    steps = [Entry("upgraded", SCHEMA_KEY, f"{SCHEMA_KEY} {upgraded.version}", None, why) for why in upgraded.sentences]
    tree, of_options = upgrade_options(upgraded.tree, document, plugins) if plugins else (upgraded.tree, [])
    tree, failures = _checked(tree, document, plugins)
    entries = (*steps, *of_options, *failures)
    is_same = not entries and Path(document.name).suffix.lower() == suffix
    text = Path(document.name).read_text(encoding="utf-8") if is_same else write_text(tree, suffix)
    origin = f"inference-shardformer's schema {upgraded.version}"
    return Migration(document.name, origin, upgraded.version, tree, entries, text)


def _checked(tree: Tree, document: Document, plugins: OptionsLookup | None) -> tuple[Tree, list[Entry]]:
    """A tree of our schema without its unknown keys and refused values, and these as entries.

    Of options in a version that cannot be read, all are refused.
    """
    settings = {key: value for key, value in tree.items() if key != SCHEMA_KEY}
    violations: list[Violation] = []
    assigned = flatten(settings, lambda path: Origin(Level.FILE, document.place(path)), violations)
    merged = merge_layers(Layers(tuple(assigned), ()))
    failures = [_entry("unknown", found, document) for found in violations]
    failures += [_entry("refused", found, document) for found in merged.violations]
    of_options = check_plugins(merged, plugins) if plugins else []
    failures += [_entry("unknown" if item.given == item.path else "refused", item, document) for item in of_options]
    if failures:
        refused = merged.refused | {item.path.removesuffix(f".{OPTIONS_KEY}") for item in of_options}
        kept = [item for item in assigned if not any(f"{item.path}.".startswith(f"{at}.") for at in refused)]
        tree = {SCHEMA_KEY: SCHEMA_VERSION, **{root: below for root in ROOTS if (below := nest(kept, root))}}
    return tree, failures


def _entry(kind: Kind, found: Violation, document: Document) -> Entry:
    sentence = f"must be {found.rule}; {found.remedy}"
    return Entry(kind, found.path, found.given, document.lines.get(found.path), sentence)
