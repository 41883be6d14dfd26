"""The table of configuration fields: every path with its rule and default, from the two typed roots."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.rules import choices_of, kinds_of, rule_of
from inference_shardformer.config.shard import ShardConfig

ROOTS: Mapping[str, type[BaseModel]] = {"shard": ShardConfig, "inference": InferenceConfig}
ENVIRONMENT_PREFIX = "INFERENCE_SHARDFORMER_"


@dataclass(frozen=True)
class ConfigField:
    """One field: its full path (`inference.cache.block_size`), what it accepts, and its default.

    `choices` are the words it accepts beside numbers or instead of them, `unit` what a number counts, `flag` the
    command-line option that stands for it, if there is one. `is_text`: it accepts any text; `is_optional`: null;
    `is_open`: it holds names that are not ours: the options of plug-ins.
    """

    path: str
    rule: str
    choices: tuple[str, ...]
    default: object
    description: str
    unit: str = ""
    flag: str = ""
    is_text: bool = False
    is_optional: bool = False
    is_open: bool = False

    @property
    def variable(self) -> str:
        """The environment variable of this field."""
        return ENVIRONMENT_PREFIX + self.path.replace(".", "__").upper()


@cache
def all_fields() -> Mapping[str, ConfigField]:
    """Every field by its full path."""
    return {field.path: field for root, model in ROOTS.items() for field in _walk(model, root)}


@cache
def all_groups() -> frozenset[str]:
    """Full paths of every group of fields, the two roots included."""
    return frozenset(
        path.rsplit(".", depth)[0] for path in all_fields() for depth in range(1, path.count(".") + 1)
    )  # fmt: skip


def members(group: str) -> list[str]:
    """The names directly below a group."""
    return sorted({path[len(group) + 1 :].split(".")[0] for path in all_fields() if path.startswith(f"{group}.")})


def open_field(path: str) -> ConfigField | None:
    """The open field that `path` is or lies in, such as the options of attention backends."""
    return next(
        (field for field in all_fields().values() if field.is_open and f"{path}.".startswith(f"{field.path}.")), None
    )


def full_path(path: str) -> str:
    """`path` with its root: `cache.block_size` is `inference.cache.block_size`. Unknown paths come back unchanged.

    The root may be left out because no name stands directly below both roots.
    """
    if path in all_fields() or path in all_groups():
        return path
    owners = [root for root, model in ROOTS.items() if path.split(".")[0] in model.model_fields]
    return f"{owners[0]}.{path}" if len(owners) == 1 else path


def suggest(path: str) -> str:
    """The known path nearest to an unknown one, by spelling or by its last name; empty if none is near."""
    known = [*all_fields(), *sorted(all_groups())]
    path = path.lower()
    near = difflib.get_close_matches(full_path(path), known, n=1, cutoff=0.75)
    if near and not path.startswith(f"{near[0]}."):  # a setting is not meant to be the group that it is in
        return near[0]
    name = path.rsplit(".", 1)[-1]
    by_name = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(known)}
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)
    return by_name[close[0]] if close else ""


def _walk(model: type[BaseModel], prefix: str) -> Iterator[ConfigField]:
    """Fields of `model` and of the groups below it."""
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}"
        kind = info.annotation
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, path)
        else:
            yield _field(path, info)


def _field(path: str, info: FieldInfo) -> ConfigField:
    declared = info.json_schema_extra if isinstance(info.json_schema_extra, Mapping) else {}
    return ConfigField(
        path=path,
        rule=rule_of(info),
        choices=tuple(choices_of(info)),
        default=info.get_default(call_default_factory=True),
        description=info.description or "",
        unit=str(declared.get("unit", "")),
        flag=str(declared.get("flag", "")),
        is_text=str in kinds_of(info),
        is_optional=type(None) in kinds_of(info),
        is_open=get_origin(info.annotation) is dict,
    )
