"""The checks of the kit: each raises `ConformanceFailure` with what is wrong, or returns."""

from __future__ import annotations

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, ShardConfig
from inference_shardformer.conformance.verdicts import ConformanceFailure, require
from inference_shardformer.errors import PlanFileError, PolicyError, TensorParallelSizeError
from inference_shardformer.policies.base import Policy
from inference_shardformer.policies.contract import policy_problem
from inference_shardformer.policy_conformance.forwards import choices_of, foreign_modules
from inference_shardformer.policy_conformance.subject import PolicySubject
from inference_shardformer.sharded import planned_tensors
from inference_shardformer.sharding.plan_check import check_consistency
from inference_shardformer.sharding.plan_file import PlanFile
from inference_shardformer.verification.verify import verify_sharding


def require_contract(subject: PolicySubject) -> None:
    """Version, name and architectures are declared, and every architecture has a sample."""
    policy = type(subject.policy())
    problem = policy_problem(policy)
    require(problem is None, f"{policy.__qualname__}: {problem}")
    declared = any("contract_version" in vars(base) for base in policy.__mro__ if base is not Policy)
    require(declared, "it declares no contract_version; write the version that it was written for as a number")
    require(bool(policy.architectures), "it announces no architecture, so nothing would find it")
    samples = {type(subject.model(case)).__name__ for case in subject.configs}
    untried = sorted(set(policy.architectures) - samples)
    require(not untried, f"it announces {', '.join(untried)}, of which no configuration was given")
    silent = sorted(samples - set(policy.architectures))
    require(not silent, f"it was given {', '.join(silent)}, which its architectures do not announce")


def require_facts(subject: PolicySubject, case: str) -> None:
    """The facts are those of the model: its class, its vocabulary, its layers, its widths."""
    facts, model = subject.facts(case), subject.model(case)
    config, table = model.config, model.get_input_embeddings().get_parameter("weight")
    expected = {
        "architecture": type(model).__name__,
        "vocab_size": table.shape[0],
        "num_layers": config.num_hidden_layers,
        "total_num_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    wrong = [
        f"{name} is {getattr(facts, name)!r}, not {value!r}"
        for name, value in expected.items()
        if getattr(facts, name) != value
    ]
    require(not wrong, f"its facts are not those of the model: {'; '.join(wrong)}")
    again = subject.facts(case)
    require(again == facts, "the same configuration gives other facts the second time")


def require_coverage(subject: PolicySubject, case: str, tp_size: int) -> None:
    """Every tensor of the checkpoint is taken by some rank, in range and side by side; twice the same."""
    policy, model = subject.policy(), subject.model(case)
    plans = subject.plans(case, tp_size)
    file = PlanFile.of(plans, planned_tensors(policy, subject.facts(case), model), policy=policy.name)
    try:
        check_consistency(file.document, plans, "the plan")
    except PlanFileError as exc:
        raise ConformanceFailure(exc.message) from exc
    left = sorted(set(planned_tensors(policy, subject.facts(case), model)) - set(file.document.tensors))
    require(not left, f"no rank takes {', '.join(left[:4])}")
    require(subject.plans(case, tp_size) == plans, "the same model gives another plan the second time")


def require_refusals(subject: PolicySubject, case: str) -> None:
    """Numbers of ranks that cannot be planned are refused before, with the possible ones named."""
    policy, facts = subject.policy(), subject.facts(case)
    possible = [size for size in range(1, facts.total_num_heads + 2) if policy.tp_size_problem(facts, size) is None]
    require(1 in possible, f"it refuses a single rank: {policy.tp_size_problem(facts, 1)}")
    for size in range(1, facts.total_num_heads + 2):
        if size in possible:
            try:
                subject.plans(case, size)
            except PolicyError as exc:
                raise ConformanceFailure(f"it allows tp_size={size}, and cannot plan it: {exc.message}") from exc
            continue
        try:
            policy.check_tp_size(facts, size)
        except TensorParallelSizeError as exc:
            require(str(possible[-1]) in exc.remedy, f"its refusal of tp_size={size} does not name the possible ones")
        else:
            raise ConformanceFailure(f"tp_size={size} has a problem, and check_tp_size does not raise")


def require_sharded_right(subject: PolicySubject, case: str, tp_size: int) -> None:
    """What the verifier asks: bytes come back bit for bit, every module and every greedy token as unsharded."""
    report = verify_sharding(subject.model(case), tp_size=tp_size, policy=subject.policy())
    require(report.passed, str(report))


def require_plain_forwards(subject: PolicySubject, case: str) -> None:
    """No forward that the author wrote imports, probes or compares names."""
    config = InferenceConfig(dtype="fp32")
    with InferenceShardformer(ShardConfig(device="cpu"), config, sources=ConfigSources(environ={})) as shardformer:
        model, _ = shardformer.optimize(subject.model(case), subject.policy())
        found = {each.__qualname__: choices_of(each) for each in foreign_modules(model)}
    choosing = [f"{name}.forward has {', '.join(choices)}" for name, choices in found.items() if choices]
    require(not choosing, f"what is chosen must be bound when the module is built: {'; '.join(choosing)}")
