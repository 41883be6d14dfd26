"""verify_sharding: proves that a policy shards a model right, or names the first module where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.errors import PolicyError
from inference_shardformer.shardformer import InferenceShardformer
from inference_shardformer.simulation import simulate
from inference_shardformer.verification.rank import Outcome, verify_rank
from inference_shardformer.verification.reference import Reference, record
from inference_shardformer.verification.report import CHECKS, Finding, VerificationReport
from inference_shardformer.verification.structure import check_plans, finding_of
from inference_shardformer.verification.subject import Subject

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel

    from inference_shardformer.policies.base import Policy

PROMPT_LENGTHS = (11, 1, 6)
MAX_NEW_TOKENS = 5
_BLOCK_SIZE = 8  # prompts and what follows them cross the border of a block


def verify_sharding(
    model: PreTrainedModel | str | Path,
    *,
    tp_size: int = 2,
    policy: Policy | None = None,
    ranks: Literal["simulated", "real"] = "simulated",
    process_group: dist.ProcessGroup | None = None,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    attention_backend: str = "auto",
) -> VerificationReport:
    """Compare the sharded with the unsharded model in fp32: structure, weights, every module, logits.

    `model` is a checkpoint (folder or hub id) or a Hugging Face model, which is left as it is. Simulated ranks are
    threads of this process; with `ranks="real"` every rank makes this call and holds the unsharded model beside its
    part. Prompts of these lengths run as one ragged batch, then decode through the paged cache.

    Raises `CheckpointError`, `UnsupportedModelError` or `TensorParallelSizeError`; whatever is wrong with the policy is
    in the report.
    """
    subject = Subject.of(model, policy)
    subject.policy.check_tp_size(subject.facts, tp_size)
    findings = _structure(subject, tp_size)
    if findings:
        return _report(subject, tp_size, ranks, Outcome(findings, ["structure"]), None)
    reference = record(subject.native, prompt_lengths=prompt_lengths, max_new_tokens=MAX_NEW_TOKENS)
    config = _config(reference, attention_backend)

    def verify(make: Callable[..., InferenceShardformer]) -> Outcome:
        with make(ShardConfig(), config, sources=ConfigSources(environ={})) as shardformer:
            return verify_rank(shardformer, subject, reference)

    if ranks == "simulated":
        outcome = _merged(simulate(tp_size, lambda rank: verify(rank.shardformer)))
    else:
        outcome = verify(_real(tp_size, process_group))
    return _report(subject, tp_size, ranks, outcome, reference)


def _structure(subject: Subject, tp_size: int) -> list[Finding]:
    """What is wrong with the plans, before any rank is started."""
    try:
        plans = subject.plans(tp_size)
    except PolicyError as exc:
        return [finding_of(exc, [path for path, _ in subject.native.named_modules()])]
    return check_plans(plans, subject.tensors(), subject.native)


def _config(reference: Reference, attention_backend: str) -> InferenceConfig:
    return InferenceConfig.model_validate(
        {
            "dtype": "fp32",
            "attention": {"backend": attention_backend},
            "cache": {
                "block_size": _BLOCK_SIZE,
                "num_blocks": sum(len(sequence) // _BLOCK_SIZE + 2 for sequence in reference.sequences),
                "prefix_caching": "off",  # every token is to be compared
            },
            "scheduler": {"max_num_batched_tokens": max(map(len, reference.prompts)) + 1},  # not all fit into one step
        }
    )


def _real(tp_size: int, process_group: dist.ProcessGroup | None) -> Callable[..., InferenceShardformer]:
    def make(shard: ShardConfig, inference: InferenceConfig, *, sources: ConfigSources) -> InferenceShardformer:
        sized = ShardConfig(**{**shard.model_dump(exclude_unset=True), "tp_size": tp_size})
        return InferenceShardformer(sized, inference, process_group=process_group, sources=sources)

    return make


def _merged(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of those of all ranks: what differed first comes first."""
    found = {finding: None for outcome in outcomes for finding in outcome.findings}
    checks = list(CHECKS)
    ordered = sorted(found, key=lambda each: (checks.index(each.check), each.order, each.rank or 0))
    return Outcome(
        ordered,
        outcomes[0].done,
        sum(outcome.num_parameters for outcome in outcomes),
        sum(outcome.num_comparisons for outcome in outcomes),
        max(outcome.worst_error for outcome in outcomes),
    )


def _report(
    subject: Subject, tp_size: int, ranks: Literal["simulated", "real"], outcome: Outcome, reference: Reference | None
) -> VerificationReport:
    notes = [] if reference is None or reference.is_clear else ["no prompts were found whose greedy tokens are clear"]
    return VerificationReport(
        model=subject.name,
        policy=type(subject.policy).__name__,
        tp_size=tp_size,
        ranks=ranks,
        findings=tuple(outcome.findings),
        done=tuple(outcome.done),
        num_parameters=outcome.num_parameters,
        num_comparisons=outcome.num_comparisons,
        worst_error=outcome.worst_error,
        notes=tuple(notes),
    )
