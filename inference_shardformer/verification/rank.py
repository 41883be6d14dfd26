"""What one rank does to be verified: shard, compare the weights, then generate while every module is compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import InferenceShardformerError, PolicyError, RankFailure
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint
from inference_shardformer.verification.checked import checked_backends
from inference_shardformer.verification.mapping import features_of
from inference_shardformer.verification.reference import Reference
from inference_shardformer.verification.report import Check, Finding
from inference_shardformer.verification.structure import check_model, finding_of
from inference_shardformer.verification.subject import Subject
from inference_shardformer.verification.watch import Watch
from inference_shardformer.verification.weights import check_weights

if TYPE_CHECKING:
    from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
    from inference_shardformer.engine.engine import InferenceEngine
    from inference_shardformer.shardformer import InferenceShardformer

LOGITS_TOLERANCE = 1e-3  # of the largest logit; nothing is handed over here, so that rounding adds up over the layers


@dataclass
class Outcome:
    """What the verification of all ranks has found, alike on every rank unless a rank failed."""

    findings: list[Finding] = field(default_factory=list)
    done: list[Check] = field(default_factory=list)
    num_parameters: int = 0
    num_comparisons: int = 0
    worst_error: float = 0.0


def verify_rank(shardformer: InferenceShardformer, subject: Subject, reference: Reference) -> Outcome:
    """Verify this rank together with the others; stops after the first check that fails anywhere."""
    outcome = Outcome()
    try:
        model = subject.shard(shardformer)
    except (PolicyError, RankFailure) as exc:  # a backend or a checkpoint that is not there is no finding
        paths = [path for path, _ in subject.native.named_modules()]
        outcome.findings, outcome.done = [finding_of(exc, paths)], ["structure"]
        return outcome
    group, plan = shardformer.group, shardformer.sharded.plan
    outcome.num_parameters = len(plan.parameters)
    if _close(outcome, "structure", group, check_model(model, plan, rank=group.rank)):
        return outcome
    source = subject.source()
    findings = check_weights(model, plan, source, rank=group.rank)
    if isinstance(source, SafetensorsCheckpoint):
        source.close()
    if _close(outcome, "weights", group, findings):
        return outcome
    features = features_of(plan, reference)
    watch = Watch(model, features, reference, tp_rank=group.rank, tp_size=group.size)
    try:
        engine = shardformer.attach(model)
        with watch.watching(), checked_backends(model):
            _generate(engine, reference)
    except Exception as exc:  # noqa: BLE001 - whatever the code of a policy raises is a finding
        watch.interrupted()
        outcome.findings = [_of_failure(watch, exc, group.rank)]
        return outcome
    outcome.num_comparisons, outcome.worst_error = watch.num_comparisons, watch.worst_error
    if _close(outcome, "activations", group, _of_divergence(watch, group.rank)):
        return outcome
    outcome.done.append("run")
    free = Watch(model, features, reference, tp_rank=group.rank, tp_size=group.size, free_tolerance=LOGITS_TOLERANCE)
    with free.watching():
        tokens = _generate(engine, reference)
    findings = _of_divergence(free, group.rank, "logits") or _of_tokens(tokens, reference, group.rank)
    _close(outcome, "logits", group, findings)
    return outcome


def _generate(engine: InferenceEngine, reference: Reference) -> list[list[int]]:
    counts = [len(whole) - len(prompt) for whole, prompt in zip(reference.sequences, reference.prompts, strict=True)]
    sampling = SamplingParams(max_new_tokens=counts[0], temperature=0.0, ignore_eos=True)
    return [list(output.token_ids) for output in engine.generate(reference.prompts, sampling)]


def _close(outcome: Outcome, check: Check, group: TensorParallelGroup, findings: Sequence[Finding]) -> bool:
    """End a check on all ranks; whether one of them found something."""
    told = json.dumps([asdict(finding) for finding in findings]).encode()
    everywhere = [Finding(**each) for text in group.all_gather_bytes(told) for each in json.loads(text)]
    outcome.done.append(check)
    outcome.findings = sorted(everywhere, key=lambda finding: finding.order)
    return bool(everywhere)


def _of_divergence(watch: Watch, rank: int, check: Check = "activations") -> list[Finding]:
    found = watch.divergence
    if found is None:
        return []
    return [Finding(check, found.module, found.message, rank, found.phase, found.error, found.order)]


def _of_tokens(tokens: list[list[int]], reference: Reference, rank: int) -> list[Finding]:
    """Greedy tokens must be the same: the prompts were chosen so that no choice of the unsharded model is close."""
    for got, prompt, whole in zip(tokens, reference.prompts, reference.sequences, strict=True):
        if got != whole[len(prompt) :]:
            told = f"after a prompt of {len(prompt)} tokens it generates {got}, and unsharded {whole[len(prompt) :]}"
            return [Finding("logits", "", told, rank)]
    return []


def _of_failure(watch: Watch, exc: Exception, rank: int) -> Finding:
    """Where the model was when it raised; a difference that was seen before counts for more."""
    found = _of_divergence(watch, rank)
    if found:
        return found[0]
    failed = exc.rank if isinstance(exc, RankFailure) else rank
    module = watch.inside[-1] if watch.inside else ""
    message = exc.message if isinstance(exc, InferenceShardformerError) else f"{type(exc).__name__}: {exc}"
    return Finding("run", module, message, failed, order=0 if failed == rank else 1)
