"""VerificationReport: what was checked, what was found, as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

SCHEMA_VERSION = 1
Check = Literal["structure", "weights", "activations", "run", "logits"]
CHECKS: dict[Check, str] = {
    "structure": "every parameter is planned, whole, and tied as in the unsharded model",
    "weights": "every rank's values equal the checkpoint's, bit for bit, and padding is zero",
    "activations": "every module gives what the unsharded one gives, in prefill and decode",
    "run": "the model runs on every rank",
    "logits": "the logits of a whole generation equal those of the unsharded model",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `module` is a path in the model, empty where none can be named.

    `error` is the largest difference relative to the largest expected value; `None` where nothing was compared.
    `order` counts the places that the rank had passed before.
    """

    check: Check
    module: str
    message: str
    rank: int | None = None
    phase: str = ""
    error: float | None = None
    order: int = 0


@dataclass(frozen=True)
class VerificationReport:
    """The outcome of a verification. `findings` are in the order of the checks, the first divergence first.

    `worst_error` is the largest relative difference among the comparisons that passed.
    """

    model: str
    policy: str
    tp_size: int
    ranks: Literal["simulated", "real"]
    findings: tuple[Finding, ...]
    done: tuple[Check, ...]  # the checks that ran, a failed one being the last
    num_parameters: int = 0
    num_comparisons: int = 0
    worst_error: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check ran and found nothing."""
        return not self.findings and set(self.done) == set(CHECKS)

    @property
    def first(self) -> Finding | None:
        """The first thing that is wrong, which is the one to look at."""
        return self.findings[0] if self.findings else None

    def to_json(self) -> dict[str, object]:
        """A stable object: fields are added, never renamed, while `schema_version` stays."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "model": self.model,
            "policy": self.policy,
            "tp_size": self.tp_size,
            "ranks": self.ranks,
            "checks": {name: self._state(name) for name in CHECKS},
            "findings": [asdict(finding) for finding in self.findings],
            "num_parameters": self.num_parameters,
            "num_comparisons": self.num_comparisons,
            "worst_error": self.worst_error,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        marks: Mapping[str, str] = {"passed": "ok", "failed": "FAILED", "not run": "not run"}
        lines = [f"{self.model} with {self.policy} on {self.tp_size} {self.ranks} rank(s)"]
        lines += [f"  {name:<12} {marks[self._state(name)]:<8} {meaning}" for name, meaning in CHECKS.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [_told(finding) for finding in self.findings]
        if self.passed:
            lines.append(
                f"verified: {self.num_parameters} parameters bit for bit, {self.num_comparisons} comparisons of "
                f"activations, largest relative error {self.worst_error:.1e}"
            )
        return "\n".join(lines)

    def _state(self, name: Check) -> str:
        if any(finding.check == name for finding in self.findings):
            return "failed"
        return "passed" if name in self.done else "not run"


def _told(finding: Finding) -> str:
    rank = "" if finding.rank is None else f" on rank {finding.rank}"
    phase = f" in {finding.phase}" if finding.phase else ""
    error = "" if finding.error is None else f" (relative error {finding.error:.2g})"
    return f"{finding.check}: {finding.module or 'the model'}{rank}{phase}: {finding.message}{error}"
