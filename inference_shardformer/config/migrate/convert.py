"""Foreign values become settings of ours: every value meets its fate, then the whole is held against our rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from inference_shardformer.config.fields import ROOTS, all_fields
from inference_shardformer.config.layers import Assignment, nest
from inference_shardformer.config.loader import merge_layers
from inference_shardformer.config.migrate.fates import FAILURES, Undecided
from inference_shardformer.config.migrate.inference_fields import DIFFERENT_DEFAULTS
from inference_shardformer.config.migrate.sources import FIELDS, INFERENCE, Entry, ForeignSource, unknown_sentence
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.sources import Layers
from inference_shardformer.config.violations import show


class Converted(NamedTuple):
    """Our settings as a tree below the roots, and the entries that tell how they came about."""

    tree: dict[object, object]
    entries: list[Entry]


def convert(sources: Sequence[ForeignSource]) -> Converted:
    """Convert configurations that are used together. Two that give one setting different values are refused."""
    entries = [entry for source in sources for entry in _entries_of(source)]
    entries = list(_without_conflicts(entries))
    entries = _within_rules(entries)
    return Converted(_tree(_settings(entries)), entries)


def _entries_of(source: ForeignSource) -> Iterator[Entry]:
    """One entry for every value, for what could not become one, and for defaults that differ."""
    for name, value in source.values.items():
        yield _entry_of(source, name, value)
    yield from source.entries
    if source.is_inference:
        yield from (_default_entry(name, source) for name in DIFFERENT_DEFAULTS if name not in source.values)


def _entry_of(source: ForeignSource, name: str, value: object) -> Entry:
    """The fate of one value."""
    row = source.fields.get(name)
    text = value.text if isinstance(value, Undecided) else show(value)
    given, line = f"{name} = {text}", source.lines.get(name)
    if row is None:
        return Entry("unknown", name, given, line, unknown_sentence(source, name))
    if isinstance(value, Undecided) and row.needs_value:
        return Entry("undecided", name, given, line, f"no literal; it becomes {row.becomes}")
    fate = row.convert(value, source.values)
    return Entry(fate.kind, name, given, line, fate.sentence, fate.settings)


def _default_entry(name: str, source: ForeignSource) -> Entry:
    """A field that was left out and whose default was another than ours."""
    row = FIELDS[INFERENCE][name]
    path = row.becomes.split("`")[1]
    ours = show(all_fields()[path].default)
    sentence = f"not given: was {DIFFERENT_DEFAULTS[name]}; set {path} unless the default here, {ours}, will do"
    return Entry("changed", name, f"{name} not given", source.line, sentence)


def _without_conflicts(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, of which one that gives a setting another value than an earlier one is refused."""
    first: dict[str, Entry] = {}
    for entry in entries:
        clash = next((path for path, value in entry.settings.items() if _clashes(path, value, first)), None)
        if clash is None:
            first.update(dict.fromkeys(entry.settings, entry))
            yield entry
        else:
            other = first[clash]
            sentence = f"in conflict over {clash} with {other.given}" + (f" on line {other.line}" if other.line else "")
            yield entry._replace(kind="refused", sentence=sentence, settings={})


def _clashes(path: str, value: object, first: Mapping[str, Entry]) -> bool:
    return path in first and first[path].settings[path] != value


def _within_rules(entries: list[Entry]) -> list[Entry]:
    """The entries, of which those are refused whose settings break a rule of ours."""
    layers = Layers(tuple(_assigned(_settings(entries))), ())
    broken = {violation.path: violation for violation in merge_layers(layers).violations}
    kept = []
    for entry in entries:
        rules = [f"{broken[path].given}: must be {broken[path].rule}" for path in entry.settings if path in broken]
        kept.append(entry._replace(kind="refused", sentence="; ".join(rules), settings={}) if rules else entry)
    given = {path for entry in entries for path in entry.settings}
    general = [violation for path, violation in broken.items() if path not in given]
    return kept + [Entry("refused", item.path, item.given, None, item.rule) for item in general]


def _settings(entries: Iterable[Entry]) -> dict[str, object]:
    """Every setting of the entries that did not fail, in the order of our fields."""
    given = {path: value for entry in entries if entry.kind not in FAILURES for path, value in entry.settings.items()}
    order = list(all_fields())
    return dict(sorted(given.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _tree(settings: Mapping[str, object]) -> dict[object, object]:
    """The settings as a tree below the roots that have any."""
    trees = {root: nest(_assigned(settings), root) for root in ROOTS}
    return {root: tree for root, tree in trees.items() if tree}


def _assigned(settings: Mapping[str, object]) -> list[Assignment]:
    return [Assignment(path, value, Origin(Level.FILE)) for path, value in settings.items()]
