"""The argument parser: one parent for what every command shares, usage errors as typed errors."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from inference_shardformer.cli.report import UsageError
from inference_shardformer.config.fields import ConfigField, all_fields
from inference_shardformer.config.sources import ConfigSources, Flag

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["ArgumentParser"]


class ConfigFlag(NamedTuple):
    """A flag that stands for one configuration field; the field declares it."""

    name: str
    path: str
    metavar: str

    @property
    def dest(self) -> str:
        """The attribute under which argparse keeps it."""
        return self.name.strip("-").replace("-", "_")


def _declared(*paths: str) -> tuple[ConfigFlag, ...]:
    """The flags that these fields declare."""
    fields = (all_fields()[path] for path in paths)
    return tuple(ConfigFlag(field.flag, field.path, _metavar(field)) for field in fields)


def _metavar(field: ConfigField) -> str:
    """What a flag takes: its words, `N` for an integer, `X` for another number, else a name."""
    words = [word for word in field.choices if word != "auto"]
    number = "N" if field.rule.startswith("an integer") else "X" if field.rule.startswith("a number") else ""
    return "|".join(words) or number or "NAME"


ENGINE_FLAGS = _declared(
    "shard.tp_size",
    "inference.dtype",
    "shard.device",
    "inference.attention.backend",
    "inference.weights.quantization",
)
GENERATE_FLAGS = _declared(
    "inference.scheduler.max_num_seqs",
    "inference.sampling.max_new_tokens",
    "inference.sampling.temperature",
    "inference.sampling.top_k",
    "inference.sampling.top_p",
    "inference.seed",
)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError` and suggests the nearest option."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self._given: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what is left over here, where the options that it may have meant are known."""
        self._given = list(args or ())
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing, so that every error leaves through the same door."""
        question = f"did you mean {' and '.join(meant)}? " if (meant := self._meant()) else ""
        if "expected one argument" in message:
            option = message.split()[1].rstrip(":")
            question = f"a value that begins with a dash follows an equals sign: {option}=-VALUE. "
        raise UsageError(f"{self.prog}: {message}", remedy=f"{question}`{self.prog} --help` lists what is accepted")

    def _meant(self) -> list[str]:
        """The known options and commands nearest to the unknown ones that were given."""
        options = [option for action in self._actions for option in action.option_strings]
        commands = [name for action in self._actions for name in action.choices or () if not action.option_strings]
        given = [word.split("=")[0] for word in self._given if word.startswith("--")]
        unknown = [(word, options) for word in given if word not in options]
        first = self._given[0] if self._given else ""
        unknown += [(first, commands)] if not first.startswith("-") and first not in commands else []
        near = [difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word, known in unknown]
        return [match[0] for match in near if match]


def add_model_options(parser: ArgumentParser, *, is_required: bool = True) -> None:
    """Options of every command about a model."""
    parser.add_argument(
        "--model",
        required=is_required,
        metavar="PATH|HUB_ID|demo",
        help="checkpoint folder, Hub id, or the shipped demo model",
    )
    add_config_flags(parser, ENGINE_FLAGS)
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML, JSON or TOML; later files win; repeatable"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="PATH=VALUE",
        help="one setting, for example cache.block_size=32; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable results on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_config_flags(parser: ArgumentParser, flags: tuple[ConfigFlag, ...]) -> None:
    """Flags whose text the configuration validates; the help is the field's own description."""
    for flag in flags:
        parser.add_argument(flag.name, metavar=flag.metavar, help=all_fields()[flag.path].description)


def add_version(parser: ArgumentParser) -> None:
    """`--version`."""
    parser.add_argument(
        "--version", action="version", version=f"inference-shardformer {version('inference-shardformer')}"
    )


def sources_of(args: argparse.Namespace, *, extra: tuple[Flag, ...] = ()) -> ConfigSources:
    """Where a parsed command line takes its settings from: its files, the environment, `--set` and flags."""
    given = [
        Flag(flag.name, flag.path, getattr(args, flag.dest))
        for flag in (*ENGINE_FLAGS, *GENERATE_FLAGS)
        if getattr(args, flag.dest, None) is not None
    ]
    return ConfigSources(files=tuple(args.config), sets=tuple(args.sets), flags=(*given, *extra))
