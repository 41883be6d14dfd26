"""A plan file on many ranks: read on each, and the same on all."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.sharding.plan_file import PlanFile

if TYPE_CHECKING:
    from inference_shardformer.distributed.guard import RankGuard


def agreed_plan(guard: RankGuard, plan: str | Path | PlanFile) -> PlanFile:
    """The plan file. Raises `PlanFileError` if it cannot be read, `EnvironmentMismatchError` if ranks have others."""
    file = guard.together(
        "reading of the plan file", lambda: plan if isinstance(plan, PlanFile) else PlanFile.read(plan)
    )
    guard.agree("reading of the plan file", {"the plan file": sha256(file.document.to_text().encode()).hexdigest()})
    return file
