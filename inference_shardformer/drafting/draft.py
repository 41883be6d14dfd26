"""draft_policy: the source of a policy for a decoder that has none, proven on a small model of its architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from inference_shardformer.drafting.analyse import analyse
from inference_shardformer.drafting.attention import Packing
from inference_shardformer.drafting.rows import DraftTable
from inference_shardformer.drafting.shrink import small_model
from inference_shardformer.drafting.source import class_name, policy_source
from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.huggingface import architecture_of, build_on_meta, load_hf_config, locate_checkpoint
from inference_shardformer.policies.base import Policy
from inference_shardformer.verification.report import VerificationReport
from inference_shardformer.verification.verify import verify_sharding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TP_SIZES = (1, 2, 4)
_PACKINGS: tuple[Packing, ...] = ("by head", "by kind")


@dataclass(frozen=True)
class Draft:
    """A drafted policy: its source, the table it was written from, and what verifying it on a small model gave.

    `reports` has one for each number of ranks; it is empty while a question is open, since the policy then refuses.
    """

    table: DraftTable
    source: str
    reports: tuple[VerificationReport, ...] = ()

    @property
    def is_verified(self) -> bool:
        """Whether nothing is open and every verification passed."""
        return not self.table.undecided and bool(self.reports) and all(report.passed for report in self.reports)

    def policy(self) -> Policy:
        """The policy that the source makes."""
        return load_source(self.source, class_name(self.table.architecture))


def draft_policy(model: str | Path | PreTrainedConfig, *, verifies: bool = True) -> Draft:
    """Draft a policy for a checkpoint (folder or hub id) or a configuration; no weight is read.

    It is verified on a small model of the same architecture with random weights, on 1, 2 and 4 simulated ranks.
    Raises `CheckpointError` or `UnsupportedModelError` where there is nothing to draft from.
    """
    if isinstance(model, (str, Path)):
        folder = locate_checkpoint(model, with_weights=False)
        config = load_hf_config(folder, trust_remote_code=False)
    else:
        config = model
    architecture = architecture_of(config)
    native = build_on_meta(config, architecture)
    table = analyse(native)
    draft = Draft(table, policy_source(table))
    if not verifies:
        return draft
    if not table.undecided:
        return replace(draft, reports=_verified(draft, config, architecture))
    for packing in _PACKINGS:  # the shapes do not tell, and a verified guess does
        guessed = analyse(native, packing)
        if not guessed.undecided:
            guess = Draft(guessed, policy_source(guessed))
            guess = replace(guess, reports=_verified(guess, config, architecture))
            if guess.is_verified:
                return guess
    return draft


def derive_policy(model: str | Path | PreTrainedConfig) -> Policy:
    """A policy for a decoder that has none, used at once: the draft of `draft_policy`, if it verifies.

    Raises `UnsupportedModelError` with everything that is open, or with the first module that would be wrong.
    """
    draft = draft_policy(model)
    if draft.is_verified:
        return draft.policy()
    found = draft.reports[-1].first if draft.reports else None
    wrong = [f"{found.module or 'the model'}: {found.message}"] if found is not None else []
    raise UnsupportedModelError(
        f"no policy can be derived for {draft.table.architecture}: {'; '.join([*draft.table.undecided, *wrong])}",
        remedy="write the draft to a file with `inference-shardformer draft-policy`, and settle what is open in it",
    )


def load_source(source: str, name: str) -> Policy:
    """Run the source of a policy and make the policy of that class."""
    module = ModuleType("drafted_policy")
    exec(compile(source, "<drafted policy>", "exec"), module.__dict__)
    policy: Policy = getattr(module, name)()
    return policy


def _verified(draft: Draft, config: PreTrainedConfig, architecture: str) -> tuple[VerificationReport, ...]:
    model, policy = small_model(config, architecture), draft.policy()
    reports = []
    for tp_size in _TP_SIZES:
        reports.append(verify_sharding(model, tp_size=tp_size, policy=policy))
        if not reports[-1].passed:
            break
    return tuple(reports)
