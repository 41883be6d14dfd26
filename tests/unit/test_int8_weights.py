"""Weights that int8 cannot hold are refused by name, on all ranks."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from inference_shardformer import ConfigSources, InferenceConfig
from inference_shardformer.errors import CheckpointError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.simulation import simulate

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="the native kernels quantise")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float) -> None:
    def program(rank) -> str:
        model = tiny_model("gqa")
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[7, 0] = value  # columns of the first rank
        config = InferenceConfig(weights={"quantization": "int8"})
        with rank.shardformer(None, config, sources=ConfigSources(environ={})) as mine:
            with pytest.raises(CheckpointError) as caught:
                mine.optimize(model)
        return str(caught.value)

    first, second = simulate(2, program)
    assert first == second
    assert "model.layers.1.self_attn.o_proj.weight: row 7 of this rank holds a value that is not finite" in first
    assert "leave inference.weights.quantization unset" in first
