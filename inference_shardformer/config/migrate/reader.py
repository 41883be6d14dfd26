"""Reading a file to migrate: its format, whose configuration it holds, and which one where it holds several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference_shardformer.config.documents import Document, read_document
from inference_shardformer.config.fields import ROOTS
from inference_shardformer.config.migrate.literals import Names
from inference_shardformer.config.migrate.python_file import find_sources, parse_python
from inference_shardformer.config.migrate.schema import SCHEMA_KEY
from inference_shardformer.config.migrate.sources import FIELDS, INFERENCE, SHARD, Entry, ForeignSource
from inference_shardformer.config.migrate.traps import find_traps
from inference_shardformer.errors import ConfigError

_WRAPPERS = {
    "InferenceConfig": INFERENCE,
    "inference_config": INFERENCE,
    "ShardConfig": SHARD,
    "shard_config": SHARD,
}


@dataclass(frozen=True)
class Found:
    """What a file holds: either `ours`, a tree of our schema, or foreign configurations that are used together."""

    ours: Document | None = None
    sources: Sequence[ForeignSource] = ()
    traps: Sequence[Entry] = field(default_factory=list)


def read_file(name: str, *, lines: Sequence[int] = ()) -> Found:
    """Read one file by its suffix; nothing in it is run. `lines` choose among several configurations of one class.

    Raises ConfigError where it cannot be read, holds none, or holds several of one class and no line chooses.
    """
    if Path(name).suffix.lower() == ".py":
        return _from_python(name, lines)
    if lines:
        raise ConfigError(f"--call chooses among calls of a Python file, and {name} is none", remedy="drop --call")
    document = read_document(name)
    if not document.tree or any(key in document.tree for key in (*ROOTS, SCHEMA_KEY)):
        return Found(ours=document)
    return Found(sources=list(_from_document(document)))


def _from_python(name: str, lines: Sequence[int]) -> Found:
    """The configurations of a Python file and the calls to tell of."""
    text = _read_text(name)
    try:
        tree = parse_python(text, name)
        names = Names(tree)
        return Found(sources=_choose(find_sources(tree, names), name, lines), traps=find_traps(tree, names))
    except (RecursionError, MemoryError) as exc:  # the parser itself raises the latter
        raise ConfigError(
            f"{name}: an expression is nested too deeply to be read",
            remedy="put the configuration into a file of its own",
        ) from exc


def _from_document(document: Document) -> Iterator[ForeignSource]:
    """The configurations of a document: below the name of their class, or all in one mapping."""
    if not any(key in _WRAPPERS for key in document.tree):
        yield _from_mapping(document.tree, "", document, "")
        return
    for key, value in document.tree.items():
        name = str(key)
        if name in _WRAPPERS and isinstance(value, Mapping):
            yield _from_mapping(value, _WRAPPERS[name], document, f"{name}.")
        else:
            rule = f"stands beside {' and '.join(key for key in _WRAPPERS if key in document.tree)}; put it into one"
            source = ForeignSource(SHARD, "mapping", None)
            source.entries.append(Entry("unknown", name, name, document.lines.get(name), rule))
            yield source


def _from_mapping(tree: Mapping[object, object], owner: str, document: Document, prefix: str) -> ForeignSource:
    """One mapping of fields to values."""
    source = ForeignSource(owner, "mapping", document.lines.get(prefix.rstrip(".")))
    source.values = {str(key): value for key, value in tree.items()}
    source.lines = {name: document.lines.get(f"{prefix}{name}") for name in source.values}
    return source


def _choose(sources: Sequence[ForeignSource], name: str, lines: Sequence[int]) -> list[ForeignSource]:
    """One configuration of each class: the only one, or the one that begins or ends around a line of `lines`."""
    if not sources:
        raise ConfigError(
            f"{name}: holds no configuration of ColossalAI's",
            remedy="give a file that calls InferenceConfig(...) or ShardConfig(...), or assigns a dict of their fields",
        )
    for line in lines:
        if not any(_covers(source, line) for source in sources):
            raise ConfigError(
                f"--call {line}: no configuration of {name} stands there; it holds {_listed(sources)}",
                remedy="give one of these lines",
            )
    chosen = []
    for owner in ("", *FIELDS):
        same = [source for source in sources if source.owner == owner]
        named = [source for source in same if any(_covers(source, line) for line in lines)] or same
        if len(named) > 1:
            raise ConfigError(
                f"{name}: holds several configurations that could be meant: {_listed(named)}",
                remedy="choose one with --call LINE",
            )
        chosen += named
    return chosen


def _covers(source: ForeignSource, line: int) -> bool:
    return source.line is not None and source.line <= line <= (source.end_line or source.line)


def _listed(sources: Sequence[ForeignSource]) -> str:
    return ", ".join(map(str, sources))


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{name}: cannot be read ({exc.strerror})", remedy="check the path") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{name}: is not UTF-8 text", remedy="save it as UTF-8") from exc
