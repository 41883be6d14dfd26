"""What ranks tell each other of failures, as JSON: a failure that ends the group, or how one phase ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from inference_shardformer import errors
from inference_shardformer.errors import InferenceShardformerError, RankFailure

_MAX_TEXT = 8000


@dataclass(frozen=True)
class FailureRecord:
    """Why a group ended. The first one that is recorded is the one every rank raises."""

    rank: int
    phase: str
    cause: str
    cause_code: str = "internal"
    remedy: str = ""

    @classmethod
    def of(cls, exc: BaseException, *, rank: int, phase: str) -> FailureRecord:
        """The record of an exception that this rank raised."""
        if isinstance(exc, RankFailure):
            return cls(exc.rank, exc.phase, exc.cause, exc.cause_code, exc.remedy)
        outcome = Outcome.of(exc)
        return cls(rank, phase, outcome.described, outcome.code, outcome.remedy)

    @classmethod
    def died(cls, rank: int, phase: str) -> FailureRecord:
        """The rank's connection ended although it had not said goodbye."""
        remedy = "see what that rank printed last, and the host's log for the out-of-memory killer"
        return cls(rank, phase, "its process ended without a word", remedy=remedy)

    @classmethod
    def left(cls, rank: int, phase: str) -> FailureRecord:
        """The rank said goodbye while others counted on it."""
        cause = "it closed its engine, or its program ended, while other ranks waited for it"
        return cls(rank, phase, cause, remedy="let every rank make the same calls, and end after the same work")

    @classmethod
    def stalled(cls, rank: int, phase: str, *, timeout_s: float) -> FailureRecord:
        """The others have waited for the rank for too long."""
        remedy = "see what that rank was doing; when it is only slow, raise timeout_s in ShardConfig"
        return cls(rank, phase, f"stalled: other ranks have waited {timeout_s:g} s for it", remedy=remedy)

    @classmethod
    def from_json(cls, text: str) -> FailureRecord:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def to_error(self) -> RankFailure:
        """The exception to raise."""
        return RankFailure(
            rank=self.rank, phase=self.phase, cause=self.cause, cause_code=self.cause_code, remedy=self.remedy
        )


@dataclass(frozen=True)
class Outcome:
    """How one rank ended a phase. `error` is the name of the exception's class, empty when all went well."""

    error: str = ""
    code: str = ""
    message: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, exc: BaseException | None) -> Outcome:
        """The outcome of a phase that ended with `exc`, or well."""
        if exc is None:
            return cls()
        if not isinstance(exc, InferenceShardformerError):
            return cls(type(exc).__name__, "internal", str(exc)[:_MAX_TEXT], "")
        known = next(base for base in type(exc).__mro__ if vars(errors).get(base.__name__) is base)
        return cls(known.__name__, exc.code, exc.message[:_MAX_TEXT], exc.remedy[:_MAX_TEXT])

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @property
    def described(self) -> str:
        """The error in one line of text: our own messages speak for themselves, others need their type."""
        if self._class() is not None:
            return self.message
        return f"{self.error}: {self.message}" if self.message else self.error

    def to_error(self, *, prefix: str) -> InferenceShardformerError | None:
        """The same error again, when it is one of ours."""
        error = self._class()
        return None if error is None else error(prefix + self.message, remedy=self.remedy)

    def _class(self) -> type[InferenceShardformerError] | None:
        found = vars(errors).get(self.error)
        is_ours = isinstance(found, type) and issubclass(found, InferenceShardformerError)
        return found if is_ours and found is not RankFailure else None


def error_of_phase(outcomes: Sequence[Outcome], *, phase: str) -> InferenceShardformerError | None:
    """The one error all ranks raise for a phase: that of the lowest rank that failed; `None` when all went well."""
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error]
    if not failed:
        return None
    first = outcomes[failed[0]]
    all_alike = all(outcome == first for outcome in outcomes)
    error = first.to_error(prefix="" if all_alike else f"rank {failed[0]}: ")
    return error or RankFailure(rank=failed[0], phase=phase, cause=first.described, remedy=first.remedy)
