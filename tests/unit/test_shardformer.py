"""The wrapper: its states, what it refuses and when, and what it explains. One rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import hf_greedy, save_tiny_model, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaAttention

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.errors import (
    BackendUnavailableError,
    CapacityError,
    CheckpointError,
    ConfigError,
    EnvironmentMismatchError,
    PolicyError,
    StateError,
    UnsupportedModelError,
)
from inference_shardformer.shardformer import State

SMALL_CACHE = {"cache": {"block_size": 4, "num_blocks": 32}, "dtype": "fp32"}
CPU = ShardConfig(device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_model("gqa", folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def _shardformer(**inference: object) -> InferenceShardformer:
    return InferenceShardformer(CPU, InferenceConfig.model_validate({**SMALL_CACHE, **inference}))


def _refused(folder: Path, error: type[Exception], said: str, **inference: object) -> Exception:
    """The error of loading, which must come before any parameter is filled."""
    with _shardformer(**inference) as shardformer, pytest.raises(error, match=said) as caught:
        shardformer.from_pretrained(folder)
    return caught.value


def test_states_follow_the_calls(checkpoint: Path) -> None:
    shardformer = _shardformer()
    assert shardformer.state is State.CREATED
    model = shardformer.from_pretrained(checkpoint)
    assert shardformer.state is State.SHARDED
    shardformer.attach(model)
    assert shardformer.state is State.ATTACHED
    shardformer.close()
    shardformer.close()
    assert shardformer.state is State.CLOSED


def test_illegal_calls_name_the_state_and_the_legal_ones(checkpoint: Path) -> None:
    with _shardformer() as shardformer:
        with pytest.raises(StateError, match="'created'") as caught:
            shardformer.attach(nn.Linear(1, 1))
        assert "from_pretrained()" in caught.value.remedy
        for premature in ("group", "sharded"):
            with pytest.raises(StateError, match=premature):
                getattr(shardformer, premature)
        with pytest.raises(StateError, match="explain"):
            shardformer.explain()
        shardformer.from_pretrained(checkpoint)
        with pytest.raises(StateError, match="'sharded'"):
            shardformer.from_pretrained(checkpoint)
    with pytest.raises(StateError, match="'closed'"):
        shardformer.optimize(tiny_model("gqa"))


def test_attach_refuses_a_model_of_somebody_else(checkpoint: Path) -> None:
    with _shardformer() as shardformer:
        shardformer.from_pretrained(checkpoint)
        with pytest.raises(StateError, match="another LlamaForCausalLM"):
            shardformer.attach(tiny_model("gqa"))


def test_a_failed_load_leaves_a_state_that_says_so(tmp_path: Path) -> None:
    with _shardformer() as shardformer:
        with pytest.raises(CheckpointError):
            shardformer.from_pretrained(tmp_path / "absent" / "folder")
        assert shardformer.state is State.FAILED
        with pytest.raises(StateError, match="'failed'"):
            shardformer.from_pretrained(tmp_path)


def test_closing_closes_the_engine(checkpoint: Path) -> None:
    shardformer = _shardformer()
    engine = shardformer.attach(shardformer.from_pretrained(checkpoint))
    shardformer.close()
    with pytest.raises(StateError, match="closed"):
        engine.generate([[1]])


def test_two_engines_in_one_process_do_not_meet(checkpoint: Path) -> None:
    reference = tiny_model("gqa")
    with _shardformer() as one, _shardformer(cache={"block_size": 8, "num_blocks": 16}) as other:
        first, second = one.attach(one.from_pretrained(checkpoint)), other.attach(other.from_pretrained(checkpoint))
        first.add_request([1, 2, 3], SamplingParams(max_new_tokens=8))
        expected = hf_greedy(reference, [4, 5], 8)
        assert list(second.generate([[4, 5]], SamplingParams(max_new_tokens=8))[0].token_ids) == expected
        one.close()
        assert list(second.generate([[4, 5]], SamplingParams(max_new_tokens=8))[0].token_ids) == expected


def test_optimize_shards_in_place_and_names_tied_parameters() -> None:
    model = tiny_model("tied")
    with _shardformer() as shardformer:
        sharded, shared = shardformer.optimize(model)
        assert sharded is model
        assert shared == [("model.embed_tokens.weight", "lm_head.weight")]
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_optimize_serves_a_model_that_was_never_saved() -> None:
    reference = tiny_model("gqa")
    model = tiny_model("gqa")
    model.config.architectures = None
    with _shardformer() as shardformer:
        sharded, _ = shardformer.optimize(model)
        engine = shardformer.attach(sharded)
        assert list(engine.generate([[3, 1]], SamplingParams(max_new_tokens=6))[0].token_ids) == hf_greedy(
            reference, [3, 1], 6
        )


def test_printing_a_sharded_model_names_the_backend() -> None:
    with _shardformer() as shardformer:
        sharded, _ = shardformer.optimize(tiny_model("gqa"))
        assert "backend=cpu, heads=8, kv_heads=4, head_dim=8" in repr(sharded)


def test_custom_attention_class_is_refused_and_the_model_left_alone() -> None:
    class MyAttention(LlamaAttention):
        pass

    model = tiny_model("gqa")
    model.model.layers[1].self_attn.__class__ = MyAttention
    before = {name: type(module) for name, module in model.named_modules()}
    with _shardformer() as shardformer, pytest.raises(PolicyError, match=r"layers\.1\.self_attn is a MyAttention"):
        shardformer.optimize(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)).save_pretrained(tmp_path)
    _refused(tmp_path, UnsupportedModelError, "supported: LlamaForCausalLM")


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "absent", CheckpointError, "no such folder")
    _refused(tmp_path, CheckpointError, "holds no config.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "hidden_size": "wide"}', "{}"])
def test_broken_config_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    _refused(copy, CheckpointError, "config.json")


def test_config_without_architecture_is_refused(copy: Path) -> None:
    text = (copy / "config.json").read_text().replace('"LlamaForCausalLM"', "")
    (copy / "config.json").write_text(text)
    _refused(copy, UnsupportedModelError, "names no architecture")


def test_broken_generation_config_is_refused(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    _refused(copy, CheckpointError, "generation_config.json")


def test_truncated_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refused(copy, CheckpointError, "truncated or corrupt")


def test_missing_and_unexpected_weights_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.7.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    error = _refused(copy, CheckpointError, r"2 place\(s\)")
    assert "missing model.norm.weight" in str(error)
    assert "unexpected model.layers.7.extra" in str(error)


def test_tied_checkpoint_may_hold_the_head_or_not(tmp_path: Path) -> None:
    reference = save_tiny_model("tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with _shardformer() as shardformer:
        engine = shardformer.attach(shardformer.from_pretrained(tmp_path))
        assert list(engine.generate([[9]], SamplingParams(max_new_tokens=4))[0].token_ids) == hf_greedy(
            reference, [9], 4
        )


def test_more_ranks_than_run_is_refused_before_loading(checkpoint: Path) -> None:
    with InferenceShardformer(ShardConfig(tp_size=2, device="cpu")) as shardformer:
        with pytest.raises(EnvironmentMismatchError, match="tp_size=2"):
            shardformer.from_pretrained(checkpoint)


def test_absent_device_is_refused(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with InferenceShardformer(ShardConfig(device="cuda")) as shardformer:
        with pytest.raises(EnvironmentMismatchError, match="no CUDA device"):
            shardformer.from_pretrained(checkpoint)


def test_unknown_backend_lists_the_known(checkpoint: Path) -> None:
    _refused(checkpoint, BackendUnavailableError, "sdpa", attention={"backend": "sdpaa"})


def test_too_long_max_model_len_is_refused(checkpoint: Path) -> None:
    error = _refused(checkpoint, ConfigError, "max_model_len = 300", max_model_len=300)
    assert "256" in str(error)


def test_cache_that_cannot_hold_a_block_is_refused(checkpoint: Path) -> None:
    with _shardformer(cache={"memory_limit": 100}) as shardformer:
        model = shardformer.from_pretrained(checkpoint)
        with pytest.raises(CapacityError, match="block"):
            shardformer.attach(model)


def test_explanation_tells_values_sources_and_verdicts(checkpoint: Path) -> None:
    with _shardformer() as shardformer:
        shardformer.attach(shardformer.from_pretrained(checkpoint))
        text = str(shardformer.explain())
    for said in ("dtype", "fp32", "the model's context", "chosen", "could serve", "cache    "):
        assert said in text


def test_every_rank_may_follow_the_load(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    with _shardformer() as shardformer:
        shardformer.from_pretrained(checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_type_of_a_model_in_memory_is_that_of_its_weights() -> None:
    model = tiny_model("gqa")
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig()) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model.bfloat16())[0])
        assert engine.kv_cache.spec.dtype == torch.bfloat16
        (dtype,) = (each for each in shardformer.explain().decisions if each.path == "inference.dtype")
    assert (dtype.value, dtype.reason) == ("bf16", "the type of the weights")
