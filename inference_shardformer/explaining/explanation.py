"""Explanation: what was decided and why, as text for people and as a stable object for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypedDict

from inference_shardformer.attention.selector import Selection
from inference_shardformer.attention.verdicts import LayerVerdicts
from inference_shardformer.config.effects import ConfigEvent
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.migrate.schema import SCHEMA_VERSION
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.mutability import mutability_of
from inference_shardformer.config.resolved import Decision, ResolvedConfig
from inference_shardformer.config.violations import show
from inference_shardformer.distributed.all_reduce import AllReduceChoice
from inference_shardformer.explaining.backends import BackendGroup, merge_ranks
from inference_shardformer.explaining.kernels import HEADER, as_selection, kernel_rows, kernels_object
from inference_shardformer.explaining.text import COLUMNS, INDENT, REQUESTS, aligned
from inference_shardformer.resolving.kernels import ChosenKernels
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.sharded import Sharded


class BeatenObject(TypedDict):
    """A value that was given and overridden."""

    value: object
    origin: str
    level: str


class ValueObject(TypedDict):
    """One setting."""

    path: str
    value: object
    origin: str
    level: str
    reason: str
    mutability: str
    beaten: list[BeatenObject]


@dataclass(frozen=True)
class Explanation:
    """Every final value with its origin, its reason and what it beat, and what follows from them for one model.

    `rank_bytes` are the bytes of weights of each rank, `rank_verdicts` what each says of the attention backends of its
    layers, `kernels` the choices around attention by kind. Without a model there are none of these and no `facts`, and
    what hangs on the model reads "auto". `notes` are sentences about the running engine alone.
    """

    decisions: tuple[Decision, ...]
    events: tuple[ConfigEvent, ...] = ()
    facts: ModelFacts | None = None
    policy: str = ""
    rank_bytes: tuple[int, ...] = ()
    rank_verdicts: tuple[tuple[LayerVerdicts, ...], ...] = ()
    kernels: Mapping[str, Selection] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """A stable object for programs; the same offline and from a running engine, but for `notes`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {**asdict(self.facts), "policy": self.policy} if self.facts else None,
            "values": [_value_object(decision) for decision in self.decisions],
            "ranks": [{"rank": rank, "weight_bytes": num_bytes} for rank, num_bytes in enumerate(self.rank_bytes)],
            "attention": self._attention_object(),
            "kernels": kernels_object(self.kernels),
            "events": [event._asdict() for event in self.events],
            "notes": list(self.notes),
        }

    def headline(self) -> list[str]:
        """The model and its ranks, one fact a line."""
        if self.facts is None:
            return ["no model: what hangs on one reads auto (give --model)"]
        facts = self.facts
        lines = [
            f"model    {facts.architecture} by {self.policy}: {facts.num_layers} layers, hidden {facts.hidden_size}, "
            f"{facts.total_num_heads} heads, {facts.total_num_kv_heads} key/value heads, head_dim {facts.head_dim}, "
            f"vocabulary {facts.vocab_size}, context {facts.max_position_embeddings}"
        ]
        held = [f"rank {rank}: {num_bytes / 1e6:.1f} MB" for rank, num_bytes in enumerate(self.rank_bytes)]
        return [*lines, f"weights  {', '.join(held)}", *self.notes]

    def rows(self) -> list[tuple[str, str, str]]:
        """The settings as rows of text under `COLUMNS`, below a row for each group; units stand with the values."""
        rows: list[tuple[str, str, str]] = []
        current = ""
        for decision in self.decisions:
            group, _, name = decision.path.rpartition(".")
            if group != current:
                rows.append((group, "", ""))
            current = group
            rows.append((f"{INDENT}{name}", _measured(decision), _account(decision)))
        return rows

    @property
    def attention(self) -> tuple[BackendGroup, ...]:
        """The attention backends, for each group of layers and of ranks that have the same."""
        return merge_ranks(self.rank_verdicts)

    def verdicts(self) -> list[tuple[str, str]]:
        """A header, and under the layers and ranks of each group every attention backend with its verdict."""
        groups = self.attention
        if not groups:
            return []
        header = (f"attention backends (asked for: {groups[0].selection.requested})", "verdict")
        return [header, *(row for group in groups for row in group.rows())]

    def kernel_verdicts(self) -> list[tuple[str, str]]:
        """A header, and under each kind of kernel every candidate with its verdict."""
        return [HEADER, *kernel_rows(self.kernels)] if self.kernels else []

    def _attention_object(self) -> dict[str, object] | None:
        groups = self.attention
        if not groups:
            return None
        return {"requested": groups[0].selection.requested, "groups": [group.to_json() for group in groups]}

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, width: int = 120) -> str:
        """Aligned text within `width` columns."""
        parts = [*self.headline(), "", *aligned(COLUMNS, self.rows(), width), "", REQUESTS]
        if verdicts := self.verdicts():
            parts += ["", *aligned(verdicts[0], verdicts[1:], width)]
        if kernels := self.kernel_verdicts():
            parts += ["", *aligned(kernels[0], kernels[1:], width)]
        if self.events:
            parts += ["", "let pass by inference.strict=false", *(f"  {event.message}" for event in self.events)]
        return "\n".join(parts)


def explain_engine(prepared: Prepared, sharded: Sharded, config: ResolvedConfig, *, cache_reason: str) -> Explanation:
    """The explanation of a sharded model; `config` is what holds now."""
    read = f"rank {sharded.plan.layout.tp_rank} read {sharded.bytes_read / 1e6:.1f} MB from files"
    return Explanation(
        decisions=config.decisions,
        events=prepared.events,
        facts=prepared.facts,
        policy=type(prepared.policy).__name__,
        rank_bytes=sharded.rank_bytes,
        rank_verdicts=prepared.rank_verdicts,
        kernels=kernel_selections(prepared.chosen_kernels, prepared.all_reduce),
        notes=(f"loaded   {read}", *([f"cache    {cache_reason}"] if cache_reason else [])),
    )


def kernel_selections(chosen: ChosenKernels, all_reduce: AllReduceChoice) -> dict[str, Selection]:
    """The choice of every kernel by the name of its kind, and of the all-reduce."""
    return {
        **{kind.value: selection for kind, selection in chosen.selections.items()},
        "all_reduce": as_selection(all_reduce),
    }


def _value_object(decision: Decision) -> ValueObject:
    return {
        "path": decision.path,
        "value": decision.value,
        "origin": str(decision.origin),
        "level": decision.origin.level.name.lower(),
        "reason": decision.reason,
        "mutability": mutability_of(decision.path) if decision.path in all_fields() else "init_only",
        "beaten": [
            {"value": item.value, "origin": str(item.origin), "level": item.origin.level.name.lower()}
            for item in decision.beaten
        ],
    }


def _measured(decision: Decision) -> str:
    """The value with its unit, where it is a number."""
    known = all_fields().get(decision.path)
    is_number = isinstance(decision.value, int | float) and not isinstance(decision.value, bool)
    unit = "" if known is None or not is_number else known.unit.partition(",")[0]
    return f"{show(decision.value)} {unit}".strip()


def _account(decision: Decision) -> str:
    """Where a value comes from, why it is what it is, and what was overridden."""
    source = f"{decision.origin}: {decision.reason}" if decision.reason else str(decision.origin)
    beaten = ", ".join(f"{show(item.value)} ({item.origin})" for item in decision.beaten)
    return f"{source}, instead of {beaten}" if beaten else source
