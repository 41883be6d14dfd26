"""Rotary embeddings by tables of all lengths: equal to those that are looked up on the host, without a look at it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from family_models import family_config
from tiny_models import tiny_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from waiting import Watch

from inference_shardformer.layers.rotary import LengthDependentRotaryEmbedding, RotaryTable, TabledRotaryEmbedding
from inference_shardformer.policies.base import BuildContext
from inference_shardformer.policies.registry import policy_for
from inference_shardformer.policies.rotary import rotary_from_native

CASES = {
    "dynamic": (lambda: tiny_config("rope_dynamic"), LlamaRotaryEmbedding, "LlamaForCausalLM", 256 - 32 + 1),
    "longrope": (lambda: family_config("phi3_longrope"), Phi3RotaryEmbedding, "Phi3ForCausalLM", 2),
}


def _modules(name: str) -> tuple[LengthDependentRotaryEmbedding, TabledRotaryEmbedding, int, int]:
    make, native_class, architecture, num_rows = CASES[name]
    config = make()
    facts = policy_for(architecture).facts(config)
    group = SimpleNamespace(device=torch.device("cpu"))
    context = BuildContext(facts, config, cast("Any", group), *cast("Any", (None, None)), (0, 1))
    native = native_class(config=config)
    on_device = replace(context, group=cast("Any", SimpleNamespace(device=torch.device("cuda"))))
    plain, tabled = (rotary_from_native(native, {}, each) for each in (context, on_device))
    assert type(plain) is LengthDependentRotaryEmbedding
    assert type(tabled) is TabledRotaryEmbedding
    return plain, tabled, facts.max_position_embeddings, num_rows


@pytest.mark.parametrize("name", CASES)
def test_every_length_has_the_frequencies_that_hugging_face_gives_it(name: str) -> None:
    plain, tabled, longest, num_rows = _modules(name)
    assert len(tabled.rows) == num_rows
    lengths = torch.arange(1, longest + 1)
    positions = torch.stack((lengths - 1, lengths))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(0, dtype=dtype)
        for ours, theirs in zip(tabled(x, positions), plain(x, positions), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait_for_the_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tabled, _, _ = _modules(name)
    found = []
    for module in (plain, tabled):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            with watch:
                module(torch.empty(0), torch.tensor([[3, 9, 40], [30, 30, 41]]))
        found.append(watch.found)
    assert "tolist" in found[0]
    assert found[1] == []


@pytest.mark.parametrize("case", ["gqa", "rope_linear", "rope_llama3", "rope_yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_holds_what_the_module_makes_of_each_position(case: str, dtype: torch.dtype) -> None:
    rotary = LlamaRotaryEmbedding(config=tiny_config(case))
    table = RotaryTable(rotary, dtype)
    for num_positions in (1, 1024, 1025, 5000, 7):  # as long as the longest before
        cos, sin = table.upto(num_positions)
        positions = torch.tensor([[num_positions - 1, 0, num_positions // 2]])
        for ours, theirs in zip((cos, sin), rotary(torch.empty(0, dtype=dtype), positions), strict=True):
            assert torch.equal(ours[positions[0]], theirs[0])
    assert len(cos) == 8192
