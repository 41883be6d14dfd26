"""Resolving: every "auto" gets a value and a reason, and what was asked is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import tiny_config

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import Level, Origin
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.errors import ConfigError
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.resolution import Decided, HostFacts, resolve, resolve_dtype

HOST = HostFacts(tp_size=2, ranks_on_host=2, device="cpu", device_reason="no CUDA device is present")


@pytest.fixture
def facts() -> ModelFacts:
    return LlamaPolicy().facts(tiny_config("gqa"))


def _resolve(facts: ModelFacts, *, host: HostFacts = HOST, **inference: object) -> ResolvedConfig:
    config = InferenceConfig.model_validate(inference)
    return resolve(
        ShardConfig(),
        config,
        facts=facts,
        host=host,
        provenance={"inference.seed": Origin(Level.FILE, "run.yaml:3")},
        dtype=resolve_dtype(config, facts),
        attention_backend=Decided("sdpa", "the first"),
    )


def test_no_auto_is_left(facts: ModelFacts) -> None:
    config = _resolve(facts)
    decided = {decision.path: decision for decision in config.decisions}
    for path in (
        "shard.tp_size",
        "shard.device",
        "shard.threads_per_rank",
        "inference.dtype",
        "inference.max_model_len",
    ):
        assert decided[path].value != "auto"
        assert decided[path].reason


def test_origins_are_told(facts: ModelFacts) -> None:
    decided = {decision.path: decision for decision in _resolve(facts).decisions}
    assert decided["inference.seed"].origin == "file run.yaml:3"
    assert decided["inference.dtype"].origin == "default"


@pytest.mark.parametrize(("checkpoint", "expected"), [("bf16", "bf16"), ("fp16", "fp16"), (None, "fp32")])
def test_auto_dtype_is_the_checkpoints(facts: ModelFacts, checkpoint: str | None, expected: str) -> None:
    assert resolve_dtype(InferenceConfig(), replace(facts, checkpoint_dtype=checkpoint)).value == expected


def test_named_dtype_wins(facts: ModelFacts) -> None:
    assert _resolve(facts, dtype="bf16").dtype == "bf16"


def test_cores_are_shared_by_the_ranks_of_a_host(facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert _resolve(facts).threads_per_rank == 3


def test_context_limits_max_model_len(facts: ModelFacts) -> None:
    assert _resolve(facts).max_model_len == facts.max_position_embeddings
    assert _resolve(facts, max_model_len=10).max_model_len == 10
    with pytest.raises(ConfigError, match="longer than the model's context of 256"):
        _resolve(facts, max_model_len=257)


def test_resolved_configurations_are_values(facts: ModelFacts) -> None:
    assert _resolve(facts) == _resolve(facts)
    assert hash(_resolve(facts)) == hash(_resolve(facts))
    assert _resolve(facts) != _resolve(facts, seed=1)
