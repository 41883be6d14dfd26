"""Resolving: every "auto" gets a value and a reason, and what was asked and beaten is kept."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from tiny_models import tiny_config

from inference_shardformer.compute.base import ComputeKind
from inference_shardformer.compute.linear import Compression
from inference_shardformer.config.fields import all_fields
from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.loader import load_config
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.origins import DEFAULT, Level, Origin
from inference_shardformer.config.resolved import Beaten, ResolvedConfig, with_decision
from inference_shardformer.config.snapshot import ConfigSnapshot
from inference_shardformer.config.sources import ConfigSources
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.resolving.resolution import Choices, Decided, HostFacts, resolve, resolve_dtype

HOST = HostFacts(tp_size=2, ranks_on_host=2, device="cpu", device_reason="no CUDA device is present")
NUM_BLOCKS = "inference.cache.num_blocks"


@pytest.fixture
def facts() -> ModelFacts:
    return LlamaPolicy().facts(tiny_config("gqa"))


def _resolve(
    facts: ModelFacts, *, host: HostFacts = HOST, sets: tuple[str, ...] = (), **inference: object
) -> ResolvedConfig:
    merged = load_config(ConfigSources(environ={}, sets=sets), inference=InferenceConfig.model_validate(inference))
    kernels = {f"inference.kernels.{kind.value}": Decided("torch", "the first") for kind in ComputeKind}
    options = {"inference.attention.options.sdpa.tile": 4}
    choices = Choices(Decided("sdpa", "the first"), options, kernels, compression=Compression("lossless", "it can"))
    return resolve(merged, facts=facts, host=host, choices=choices)


def test_no_auto_is_left_that_can_be_decided_before_attaching(facts: ModelFacts) -> None:
    config = _resolve(facts)
    for decision in config.decisions:
        if decision.path not in (NUM_BLOCKS, "inference.cache.memory_limit"):
            assert decision.value != "auto", decision
    for path in ("shard.tp_size", "shard.device", "shard.threads_per_rank", "inference.dtype", NUM_BLOCKS):
        assert config.decision(path).reason, path
    assert config.decision("inference.max_model_len").value == facts.max_position_embeddings


def test_every_field_and_option_has_one_decision_in_order(facts: ModelFacts) -> None:
    options = {"inference.attention.options": "inference.attention.options.sdpa.tile", "shard.policy.options": None}
    expected = [options.get(path, path) for path in all_fields() if options.get(path, path) is not None]
    assert [decision.path for decision in _resolve(facts).decisions] == expected


def test_origins_types_and_beaten_values_are_told(facts: ModelFacts) -> None:
    config = _resolve(facts, sets=("seed=3", "cache.block_size=8"), seed=4)
    seed = config.decision("inference.seed")
    assert seed.value == 4
    assert seed.origin == Origin(Level.CALL)
    assert seed.beaten == (Beaten(3, Origin(Level.CLI, "--set seed=3")), Beaten(0, DEFAULT))
    assert config.decision("inference.dtype").origin == DEFAULT
    assert config.decision("inference.cache.block_size").value == 8
    with pytest.raises(KeyError):
        config.decision("inference.cache.blok_size")


def test_values_that_are_beaten_need_no_hash(facts: ModelFacts) -> None:
    config = _resolve(facts, sets=("seed=[1, {a: 2}]",), seed=4)
    assert config.decision("inference.seed").beaten[0].value == (1, {"a": 2})
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(("checkpoint", "expected"), [("bf16", "bf16"), ("fp16", "fp16"), (None, "fp32")])
def test_auto_dtype_is_the_checkpoints(facts: ModelFacts, checkpoint: str | None, expected: str) -> None:
    assert resolve_dtype(InferenceConfig(), replace(facts, checkpoint_dtype=checkpoint)).value == expected


def test_what_the_linear_kernel_says_of_compression_is_decided(facts: ModelFacts) -> None:
    config = _resolve(facts)
    decision = config.decision("inference.weights.compression")
    assert (decision.value, decision.reason) == ("lossless", "it can")
    assert (config.compression, ConfigSnapshot(0, config).inference.weights.compression) == ("lossless", "lossless")
    assert config.inference.weights.compression == "auto"


def test_named_values_win_and_need_no_reason(facts: ModelFacts) -> None:
    config = _resolve(facts, dtype="bf16", max_model_len=10)
    assert (config.dtype, config.max_model_len) == ("bf16", 10)
    assert config.decision("inference.dtype").reason == ""


def test_cores_are_shared_by_the_ranks_of_a_host(facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert _resolve(facts).threads_per_rank == 3


def test_what_is_known_later_becomes_a_decision(facts: ModelFacts) -> None:
    config = _resolve(facts)
    later = with_decision(config, NUM_BLOCKS, 12, "enough")
    assert (config.num_blocks, later.num_blocks) == (None, 12)
    assert (later.decision(NUM_BLOCKS).value, later.decision(NUM_BLOCKS).reason) == (12, "enough")
    assert ConfigSnapshot(0, later).get("cache.num_blocks") == 12
    assert _resolve(facts, cache={"num_blocks": 5}).num_blocks == 5


def test_resolved_configurations_are_values(facts: ModelFacts) -> None:
    assert _resolve(facts) == _resolve(facts)
    assert hash(_resolve(facts)) == hash(_resolve(facts))
    assert _resolve(facts) != _resolve(facts, seed=1)
    options = {"options": {"toy": {"tiles": [1, 2]}}}
    with_options = _resolve(facts, attention=options)
    assert pickle.loads(pickle.dumps(with_options)) == with_options
    frozen = with_options.inference.attention.options
    for change in (frozen.clear, lambda: frozen.update(a=1), lambda: frozen.__setitem__("a", 1)):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    with pytest.raises(ValueError, match="not a set"):
        InferenceConfig(attention={"options": {"toy": {"tiles": {1, 2}}}})
