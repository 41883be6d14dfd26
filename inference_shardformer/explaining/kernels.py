"""The kernels section of an explanation: what computes what stands around attention, and every verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inference_shardformer.attention.selector import Selection, Verdict
from inference_shardformer.attention.spec import Reason
from inference_shardformer.distributed.all_reduce import AllReduceChoice
from inference_shardformer.explaining.text import INDENT

HEADER = ("kernels", "verdict")


def as_selection(choice: AllReduceChoice) -> Selection:
    """The all-reduce of a group like every other choice."""
    refused = [Verdict(name, tuple(Reason(*refusal) for refusal in reasons)) for name, reasons in choice.refused]
    return Selection(choice.name, choice.requested, (*refused, Verdict(choice.name, ())), choice.reason)


def kernel_rows(selections: Mapping[str, Selection]) -> list[tuple[str, str]]:
    """Each kind, and below it every candidate with its verdict."""
    rows: list[tuple[str, str]] = []
    for kind, selection in selections.items():
        rows.append((kind, f"asked for: {selection.requested}"))
        rows += [(f"{INDENT}{verdict.name}", told(verdict, selection)) for verdict in selection.verdicts]
    return rows


def kernels_object(selections: Mapping[str, Selection]) -> dict[str, object] | None:
    """A stable object for programs."""
    return {kind: _object(selection) for kind, selection in selections.items()} or None


def candidates_object(selection: Selection) -> list[dict[str, object]]:
    """Every candidate of a choice with its verdict, for programs."""
    return [
        {
            "name": verdict.name,
            "origin": verdict.origin,
            "verdict": _short(verdict, selection),
            "reasons": [reason._asdict() for reason in verdict.reasons],
        }
        for verdict in selection.verdicts
    ]


def told(verdict: Verdict, selection: Selection) -> str:
    """One candidate's verdict in words: every reason against it, or whether it was chosen."""
    return _reasons(verdict.reasons) or _short(verdict, selection)


def _short(verdict: Verdict, selection: Selection) -> str:
    if verdict.reasons:
        return "refused"
    return "chosen" if verdict.name == selection.name else "could serve"


def _reasons(reasons: Sequence[Reason]) -> str:
    return "; ".join(f"{reason.message} [{reason.code}]" for reason in reasons)


def _object(selection: Selection) -> dict[str, object]:
    return {
        "requested": selection.requested,
        "chosen": selection.name,
        "reason": selection.reason,
        "candidates": candidates_object(selection),
    }
