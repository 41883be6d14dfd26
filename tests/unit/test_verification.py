"""The verifier's report, its inputs, and what it does without a defect; `test_mutations.py` has the defects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model

from inference_shardformer.errors import CheckpointError, PolicyError, TensorParallelSizeError, UnsupportedModelError
from inference_shardformer.policies.llama import LlamaPolicy
from inference_shardformer.verification.compare import compare_whole, relative_error
from inference_shardformer.verification.report import CHECKS, Finding, VerificationReport
from inference_shardformer.verification.subject import clone
from inference_shardformer.verification.verify import verify_sharding


def test_a_checkpoint_is_verified(tmp_path: Path) -> None:
    save_tiny_model("odd_vocabulary_tied", tmp_path)
    report = verify_sharding(tmp_path, tp_size=2)
    assert report.passed, str(report)
    assert set(report.done) == set(CHECKS)
    assert report.num_parameters == 2 * (1 + 2 * 6 + 1)
    assert report.num_comparisons > 100
    assert 0 < report.worst_error < 1e-5
    assert "verified: " in str(report)


def test_a_model_in_memory_stays_as_it_is() -> None:
    model = tiny_model("tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [(name, type(module)) for name, module in model.named_modules()]
    assert verify_sharding(model, tp_size=2).passed
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_clone_shares_memory_and_ties() -> None:
    model = tiny_model("tied")
    copied = clone(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not model.lm_head.weight
    assert copied.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorParallelSizeError, match="tp_size=3"):
        verify_sharding(tiny_model("gqa"), tp_size=3)
    with pytest.raises(CheckpointError):
        verify_sharding(tmp_path)
    save_tiny_model("gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="NobodysForCausalLM"):
        verify_sharding(tmp_path, policy=LlamaPolicy())


def test_an_error_of_the_planner_names_its_module() -> None:
    class Forgetful(LlamaPolicy):
        def table(self, facts):
            return super().table(facts)[:-1]

    report = verify_sharding(tiny_model("gqa"), policy=Forgetful())
    assert report.first is not None
    assert (report.first.check, report.first.module) == ("structure", "lm_head")
    assert not report.passed
    assert "structure    FAILED" in str(report)


def test_an_error_while_modules_are_built_is_a_finding() -> None:
    class Refusing(LlamaPolicy):
        def stored(self, tensors):
            raise PolicyError("model.norm cannot be stored")

    report = verify_sharding(tiny_model("gqa"), policy=Refusing())
    assert report.first is not None
    assert report.first.module == "model.norm"


def test_json_is_stable() -> None:
    finding = Finding("activations", "model.norm", "its output differs", 1, "decode", 0.5, 7)
    report = VerificationReport("m", "P", 2, "simulated", (finding,), ("structure", "weights", "activations"))
    told = report.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["schema_version"] == 1
    assert told["passed"] is False
    assert told["checks"] == {
        "structure": "passed",
        "weights": "passed",
        "activations": "failed",
        "run": "not run",
        "logits": "not run",
    }
    assert told["findings"] == [
        {
            "check": "activations",
            "module": "model.norm",
            "message": "its output differs",
            "rank": 1,
            "phase": "decode",
            "error": 0.5,
            "order": 7,
        }
    ]
    assert "activations: model.norm on rank 1 in decode: its output differs (relative error 0.5)" in str(report)


def test_errors_are_relative_and_see_what_is_not_finite() -> None:
    want = torch.tensor([[1.0, -4.0]])
    assert relative_error(want + 0.4, want) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[float("nan"), -4.0]]), want) == float("inf")
    assert relative_error(want, torch.tensor([[float("inf"), -4.0]])) == float("inf")
    assert relative_error(want[:0], want[:0]) == 0.0


def test_fewer_features_are_compared_with_the_run_of_the_rank() -> None:
    want = torch.arange(8.0).view(1, 8)
    found = compare_whole(want[:, 4:], want, tp_rank=1, tp_size=2)
    assert found is not None
    assert (found.error, found.is_whole) == (0.0, False)
    copied = compare_whole(want[:, :4], want, tp_rank=1, tp_size=4)  # ranks 0 and 1 share the first of two heads
    assert copied is not None
    assert copied.error == 0.0
    assert compare_whole(want[:, :3], want, tp_rank=0, tp_size=2) is None
