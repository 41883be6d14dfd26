"""Options of plug-ins in a file of ours: every plug-in's own steps bring them to the version that is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from inference_shardformer.config.documents import Document
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.migrate.schema import Tree
from inference_shardformer.config.migrate.sources import Entry
from inference_shardformer.config.option_steps import OPTIONS_KEY, OptionChange, OptionsStep
from inference_shardformer.config.plugin_options import DeclaredOptions, OptionsLookup
from inference_shardformer.config.violations import show
from inference_shardformer.errors import PluginError

_FIRST_VERSION = 1
_NAMED = f"the options name their version with {OPTIONS_KEY}; the options are the same"


def upgrade_options(tree: Tree, document: Document, lookup: OptionsLookup) -> tuple[Tree, list[Entry]]:
    """The tree with the options of every plug-in in its current version, and what became of them.

    Options without a version are of the first one. Plug-ins that cannot be looked up, and versions that this one cannot
    read, stay as they are: whoever checks the options tells of them.
    """
    entries: list[Entry] = []
    for field in (path for path, known in all_fields().items() if known.is_open):
        tree = _with_group(tree, field.split("."), field, document, lookup, entries)
    return tree, entries


def _with_group(
    tree: Tree, parts: list[str], field: str, document: Document, lookup: OptionsLookup, entries: list[Entry]
) -> Tree:
    """The tree with the group at the end of `parts` upgraded; everything beside it is the same."""
    if not parts:
        return {name: _upgraded(field, str(name), given, document, lookup, entries) for name, given in tree.items()}
    below = tree.get(parts[0])
    if not isinstance(below, Mapping):
        return tree
    return {**tree, parts[0]: _with_group(dict(below), parts[1:], field, document, lookup, entries)}


def _upgraded(
    field: str, name: str, given: object, document: Document, lookup: OptionsLookup, entries: list[Entry]
) -> object:
    """The options of one plug-in in its current version."""
    if not isinstance(given, Mapping) or not given:
        return given
    try:
        declared = lookup(field, name)
    except PluginError:
        return given
    version = given.get(OPTIONS_KEY, _FIRST_VERSION)
    is_older = type(version) is int and _FIRST_VERSION <= version <= declared.version
    if declared.model is None or not is_older or (OPTIONS_KEY in given and version == declared.version):
        return given
    options = _Options({str(key): value for key, value in given.items() if key != OPTIONS_KEY}, declared, document)
    for number in range(version, declared.version):
        entries += options.take_step(number, declared.steps[number])
    if version == declared.version:
        entries.append(Entry("upgraded", declared.base, f"{declared.base} without a version", None, _NAMED))
    return {OPTIONS_KEY: declared.version, **options.tree}


class _Outcome(NamedTuple):
    """What a step makes of one option: its place in the report, and the options that it becomes, by name."""

    entry: Entry
    becomes: Mapping[str, object]


@dataclass
class _Options:
    """The options of one plug-in on their way through the steps; `lines` says where each was given, once renamed."""

    tree: dict[str, object]
    declared: DeclaredOptions
    document: Document

    def __post_init__(self) -> None:
        self.lines: dict[str, int | None] = {}

    def take_step(self, number: int, step: OptionsStep) -> Iterator[Entry]:
        """Apply one step: first every option that it names is taken out, then what they become is put in."""
        base = self.declared.base
        yield Entry("upgraded", base, f"{base} version {number}", None, f"{number} -> {number + 1}: {step.sentence}")
        outcomes = [outcome for name in _names(step) for outcome in self._outcome(name, number, step)]
        for entry, becomes in outcomes:
            clash = next((name for name in becomes if _find(self.tree, name) is not None), None)
            if clash is not None:
                sentence = f"becomes {base}.{clash}, which is given as well; keep one of the two"
                yield entry._replace(kind="refused", sentence=sentence, settings={})
                continue
            for name, value in becomes.items():
                _put(self.tree, name, value)
                self.lines[name] = entry.line
            yield entry

    def _outcome(self, name: str, number: int, step: OptionsStep) -> Iterator[_Outcome]:
        """What becomes of one option; nothing where it was not given."""
        found = _find(self.tree, name)
        if found is None:
            return
        path = f"{self.declared.base}.{name}"
        line = self.lines.get(name, self.document.lines.get(path))
        value = _take(self.tree, name)
        entry = Entry("dropped", path, f"{path} = {show(value)}", line, step.dropped.get(name, ""))
        if name in step.renamed:
            becomes: Mapping[str, object] = {step.renamed[name]: value}
            entry = entry._replace(kind="renamed", sentence=f"its name in version {number + 1}")
        elif name in step.changed:
            entry, becomes = _changed(entry, step.changed[name], value)
        else:
            becomes = {}
        settings = {f"{self.declared.base}.{new}": value for new, value in becomes.items()}
        yield _Outcome(entry._replace(settings=settings), becomes)


def _changed(entry: Entry, change: OptionChange, value: object) -> tuple[Entry, Mapping[str, object]]:
    """An option that means something else now; one that the plug-in cannot convert is refused."""
    try:
        becomes = change.convert(value)
    except Exception as exc:  # noqa: BLE001 - foreign code, given a value that nobody has checked, may raise anything
        sentence = f"{change.sentence}; the plug-in cannot convert this value: {type(exc).__name__}: {exc}"
        return entry._replace(kind="refused", sentence=sentence), {}
    return entry._replace(kind="changed", sentence=change.sentence), becomes


def _names(step: OptionsStep) -> list[str]:
    return [*step.renamed, *step.dropped, *step.changed]


def _find(tree: Mapping[str, object], name: str) -> Mapping[str, object] | None:
    """The group that holds an option; `None` where the option was not given."""
    *groups, last = name.split(".")
    branch: object = tree
    for group in groups:
        branch = branch.get(group) if isinstance(branch, Mapping) else None
    return branch if isinstance(branch, Mapping) and last in branch else None


def _take(tree: dict[str, object], name: str) -> object:
    """Take an option out, and its group if that is left empty."""
    head, _, rest = name.partition(".")
    if not rest:
        return tree.pop(head)
    below = dict(_group(tree[head]))
    value = _take(below, rest)
    if below:
        tree[head] = below
    else:
        del tree[head]
    return value


def _put(tree: dict[str, object], name: str, value: object) -> None:
    head, _, rest = name.partition(".")
    if not rest:
        tree[head] = value
        return
    below = dict(_group(tree.get(head, {})))
    _put(below, rest, value)
    tree[head] = below


def _group(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
