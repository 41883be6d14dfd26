"""The 32 known defects of ColossalAI's inference (B1-B32): what happens here instead, and the test that shows it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from tiny_models import CASES, hf_greedy, save_tiny_model, tiny_model
from torch import nn

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.errors import CheckpointError, TensorParallelSizeError
from inference_shardformer.policies.llama import LlamaPolicy

TESTS = Path(__file__).parents[1]
HERE = "e2e/test_colossalai_defects.py"
BRIDGE, ENGINE = "distributed/test_colossalai_bridge.py", "unit/test_colossalai_engine.py"
SERVE = "e2e/test_serve.py"
PARITY = "e2e/test_parity.py::test_tokens_equal_hugging_face"

# Defect -> the tests of our behaviour, and in a comment what went wrong there.
SHOWN = MappingProxyType(
    {
        "B1": (f"{BRIDGE}::test_tokens_and_logits_equal_the_unsharded_model", PARITY),  # heads not divided over ranks
        "B2": (f"{HERE}::test_no_test_of_several_ranks_is_left_out",),  # its tests of ranks ran nowhere
        "B3": ("unit/test_architecture.py::test_importing_the_package_imports_nothing_heavy",),  # kernels at import
        "B4": (f"{HERE}::test_nothing_asks_for_cuda_on_a_cpu",),
        "B5": (f"{HERE}::test_parity_covers_what_was_dropped_or_assumed", PARITY),  # biases dropped
        "B6": ("unit/test_shardformer.py::test_printing_a_sharded_model_names_the_backend",),  # repr raised
        "B7": (f"{HERE}::test_parity_covers_what_was_dropped_or_assumed", PARITY),  # head_dim ignored
        "B8": (f"{HERE}::test_parity_covers_what_was_dropped_or_assumed", PARITY),  # scaled rope raised
        "B9": (f"{ENGINE}::test_one_bad_prompt_queues_none",),
        "B10": (f"{ENGINE}::test_a_generation_config_counts_for_its_call_alone",),
        "B11": (
            f"{ENGINE}::test_texts_hold_prompt_and_completion",
            f"{ENGINE}::test_nothing_to_do_and_what_does_not_fit_raise",
        ),
        "B12": (f"{ENGINE}::test_a_generation_config_counts_for_its_call_alone",),
        "B13": (f"{HERE}::test_a_single_file_loads_and_a_broken_one_is_named",),
        "B14": ("unit/test_shardformer.py::test_missing_and_unexpected_weights_are_named",),  # never strict
        "B15": (
            f"{ENGINE}::test_a_path_and_everything_in_one_call",
            f"{ENGINE}::test_a_configuration_is_refused_before_there_is_a_model",
        ),
        "B16": (f"{ENGINE}::test_hasattr_and_copy_do_not_fail",),
        "B17": ("unit/test_block_allocator.py::test_blocks_are_owned_once_and_come_back",),
        "B18": (
            "unit/test_engine_requests.py::test_abort_at_any_time_frees_at_once_and_disturbs_nobody",
            "unit/test_async_engine.py::test_a_request_that_nobody_reads_is_aborted",
            "unit/test_serving_app.py::test_a_client_that_leaves_ends_all_it_asked_for",
        ),
        "B19": ("unit/test_scheduler.py::test_newest_is_preempted_and_comes_back_first", PARITY),
        "B21": (f"{ENGINE}::test_hasattr_and_copy_do_not_fail",),  # speculation is refused by name
        "B22": ("unit/test_shardformer.py::test_two_engines_in_one_process_do_not_meet",),
        "B24": (  # sampling leaked between requests, `stream` broke on a JSON bool, and a stream was one piece
            f"{SERVE}::test_sampling_of_requests_is_theirs_alone",
            f"{SERVE}::test_completions_are_those_of_hugging_face_streamed_or_not",
        ),
        "B25": ("e2e/test_subgroups.py::test_engines_on_subgroups_and_on_the_world",),
        "B26": (f"{HERE}::test_an_impossible_split_is_refused_with_the_possible_ones", PARITY),
        "B27": (
            "unit/test_colossalai_bridge.py::test_a_policy_that_cannot_serve_is_refused_and_the_model_restored",
            "e2e/test_custom_attention.py::test_an_unknown_class_is_refused_with_both_ways_out",
        ),
        "B28": (f"{HERE}::test_an_impossible_split_is_refused_with_the_possible_ones",),  # left whole without a word
        "B29": (f"{ENGINE}::test_a_configuration_is_refused_before_there_is_a_model",),  # beams, forced eos
        "B30": (f"{HERE}::test_the_cache_has_the_bytes_of_its_own_type",),
        "B31": (f"{ENGINE}::test_the_drop_in_needs_no_colossalai",),  # it configured logging at import
        "B32": (f"{HERE}::test_code_of_a_checkpoint_does_not_run",),
    }
)
NO_USER_MEETS = MappingProxyType(
    {
        "B20": "captured graphs held another norm than eager steps: nothing is captured here",
        "B23": "the engine in worker processes failed at its start: there is one engine here, under any launcher",
    }
)


def test_every_defect_is_accounted_for():
    assert sorted({*SHOWN, *NO_USER_MEETS}) == sorted(f"B{number}" for number in range(1, 33))
    for name in {name for tests in SHOWN.values() for name in tests}:
        path, _, function = name.partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in found, name


def test_no_test_of_several_ranks_is_left_out():
    scripts = TESTS.parent / "scripts"
    assert 'pytest" "$@"' in (scripts / "run_tests.sh").read_text()  # all of them, no selection by marker
    for path in (TESTS / "distributed").glob("test_*.py"):
        assert not re.search(
            r"^pytestmark|importorskip|allow_module_level", path.read_text(encoding="utf-8"), re.MULTILINE
        ), path


def test_parity_covers_what_was_dropped_or_assumed():
    assert {"biased", "explicit_head_dim", "rope_llama3", "rope_yarn", "mqa", "gqa_fewer_kv_heads_than_ranks"} <= set(
        CASES
    )


def test_nothing_asks_for_cuda_on_a_cpu(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("CUDA was asked for")

    for name in ("current_device", "synchronize", "empty_cache", "get_device_properties", "set_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(nn.Module, "cuda", refuse)
    monkeypatch.setattr(torch.Tensor, "cuda", refuse)
    model = tiny_model("gqa")
    expected = hf_greedy(model, [1, 2, 3], 4)
    config = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"num_blocks": 8}})
    with InferenceShardformer(ShardConfig(device="cpu"), config) as shardformer:
        engine = shardformer.attach(shardformer.optimize(model)[0])
        output = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0]
    assert list(output.token_ids) == expected


def test_a_single_file_loads_and_a_broken_one_is_named(tmp_path):
    """There an index was needed, a failed load was only logged, and the next line failed for another reason."""
    save_tiny_model("gqa", tmp_path)
    assert not list(tmp_path.glob("*.index.json"))
    with InferenceShardformer(ShardConfig(device="cpu")) as shardformer:
        assert shardformer.from_pretrained(tmp_path) is not None
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with InferenceShardformer(ShardConfig(device="cpu")) as shardformer:
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            shardformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("tp_size", "problem"), [(3, "num_attention_heads=8"), (16, "num_attention_heads=8")])
def test_an_impossible_split_is_refused_with_the_possible_ones(tp_size, problem):
    """There a layer too small for its ranks stayed whole without a word, and others failed while they were cut."""
    policy = LlamaPolicy()
    facts = policy.facts(tiny_model("gqa").config)
    with pytest.raises(TensorParallelSizeError, match=problem) as caught:
        policy.check_tp_size(facts, tp_size)
    assert "use one of 1, 2, 4, 8" in str(caught.value)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_cache_has_the_bytes_of_its_own_type(dtype, size):
    config = InferenceConfig.model_validate({"dtype": dtype, "cache": {"num_blocks": 8, "block_size": 16}})
    with InferenceShardformer(ShardConfig(device="cpu"), config) as shardformer:
        engine = shardformer.attach(shardformer.optimize(tiny_model("gqa"))[0])
        layers = [engine.kv_cache.layer(index) for index in range(2)]
        held = sum(tensor.untyped_storage().nbytes() for tensor in _storages(layers))
    assert held == 2 * 2 * 8 * 16 * 4 * 8 * size  # layers, keys and values, blocks, tokens, heads, head_dim


def _storages(layers):
    """Tensors of the cache, one for each memory."""
    tensors = [tensor for layer in layers for tensor in layer]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()


def test_code_of_a_checkpoint_does_not_run(tmp_path):
    """There it was trusted always, even to find out what kind of model it was."""
    save_tiny_model("gqa", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass OwnConfig: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with InferenceShardformer(ShardConfig(device="cpu")) as shardformer:
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            shardformer.from_pretrained(tmp_path)
    assert not ran.exists()
