"""Policies as users of ColossalAI write them, and what each does to a tiny model on the ranks of this process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_models import tiny_model
from torch import nn

from inference_shardformer import InferenceConfig, SamplingParams
from inference_shardformer.bridges.colossalai import ColossalInferenceShardformer, LlamaInferencePolicy
from inference_shardformer.bridges.colossalai.mending import mended_cpu_accelerator, unchanged_environment
from inference_shardformer.bridges.colossalai.upstream import (
    CpuAccelerator,
    ModulePolicyDescription,
    Policy,
    ShardConfig,
    SubModuleReplacementDescription,
)
from inference_shardformer.errors import InferenceShardformerError

with unchanged_environment():
    from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row, ParallelModule

COLOSSAL_INFERENCE = InferenceConfig.model_validate(
    {
        "dtype": "fp32",
        "cache": {"block_size": 4, "num_blocks": 40},
        "scheduler": {"max_num_seqs": 16, "max_num_batched_tokens": 48},
    }
)
LINEARS = [
    SubModuleReplacementDescription("mlp.gate_proj", Linear1D_Col),
    SubModuleReplacementDescription("mlp.up_proj", Linear1D_Col),
    SubModuleReplacementDescription("mlp.down_proj", Linear1D_Row),
]


class OwnMLP(ParallelModule):
    """A user's layer in ColossalAI's form, of ColossalAI's own parallel linear layers."""

    def __init__(self, native: nn.Module, process_group: object) -> None:
        super().__init__()
        self.gate = Linear1D_Col.from_native_module(native.gate_proj, process_group)
        self.up = Linear1D_Col.from_native_module(native.up_proj, process_group)
        self.down = Linear1D_Row.from_native_module(native.down_proj, process_group)

    @staticmethod
    def from_native_module(module: nn.Module, process_group: object, **kwargs: object) -> OwnMLP:
        return OwnMLP(module, process_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class OwnMLPPolicy(LlamaInferencePolicy):
    """The bridge's policy with a layer of the user's own."""

    def module_policy(self):
        return self.append_or_create_submodule_replacement(
            SubModuleReplacementDescription("mlp", OwnMLP), super().module_policy(), "LlamaDecoderLayer"
        )


class StockPolicy(Policy):
    """A policy written for ColossalAI's ShardFormer, which knows nothing of us."""

    def config_sanity_check(self):
        assert self.shard_config.pipeline_stage_manager is None

    def preprocess(self):
        return self.model

    def module_policy(self):
        return {"LlamaDecoderLayer": ModulePolicyDescription(sub_module_replacement=LINEARS)}

    def postprocess(self):
        return self.model


class ForgetfulPolicy(LlamaInferencePolicy):
    """Describes what is inside a module that is exchanged as a whole."""

    def module_policy(self):
        policy = super().module_policy()
        policy["LlamaMLP"] = ModulePolicyDescription(
            sub_module_replacement=[SubModuleReplacementDescription("gate_proj", Linear1D_Col)]
        )
        return policy


class FailingPolicy(LlamaInferencePolicy):
    """Fails after ModelSharder has exchanged what it describes."""

    def postprocess(self):
        raise KeyError("of the policy's own")


def own_mlp(prompts: list[list[int]], max_new_tokens: int) -> object:
    """Tokens with a layer of the user's own, and what unsharding says then."""
    with ColossalInferenceShardformer(ShardConfig(), COLOSSAL_INFERENCE) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"), OwnMLPPolicy())
        engine = shardformer.attach(model)
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        tokens = [list(output.token_ids) for output in engine.generate(prompts, sampling)]
        return {
            "tokens": tokens,
            "mlp": type(model.model.layers[0].mlp).__name__,
            "unshard": _error(lambda: shardformer.unshard(model)),
        }


def stock(prompts: list[list[int]], max_new_tokens: int) -> object:
    """Logits of a model that a policy of ColossalAI's sharded alone, and what attach() says then."""
    native, ids = tiny_model("gqa"), torch.tensor([prompts[0]])
    expected = native(ids).logits
    with ColossalInferenceShardformer(ShardConfig(), COLOSSAL_INFERENCE) as shardformer:
        model, _ = shardformer.optimize(tiny_model("gqa"), StockPolicy())
        difference = (model(ids).logits - expected).abs().max().item()
        return {
            "difference": difference,
            "gate": type(model.model.layers[0].mlp.gate_proj).__name__,
            "attach": _error(lambda: shardformer.attach(model)),
        }


def refused(policy: Policy) -> Callable[..., object]:
    """What optimize() says of a policy, and whether the model is what it was."""

    def run(prompts: list[list[int]], max_new_tokens: int) -> object:
        model = tiny_model("gqa")
        modules, ids = [type(module).__name__ for module in model.modules()], torch.tensor([prompts[0]])
        before = model(ids).logits
        with ColossalInferenceShardformer(ShardConfig(), COLOSSAL_INFERENCE) as shardformer:
            message = _error(lambda: shardformer.optimize(model, policy))
        is_same = [type(module).__name__ for module in model.modules()] == modules
        return {"error": message, "is_restored": is_same and torch.equal(model(ids).logits, before)}

    return run


def mending(prompts: list[list[int]], max_new_tokens: int) -> object:
    """Which methods needed mending, and whether ColossalAI's layers can be built before, meanwhile and after."""

    def build() -> str:
        Linear1D_Col.from_native_module(nn.Linear(8, 8), torch.distributed.group.WORLD)
        return ""

    before = _failure(build)
    with mended_cpu_accelerator(CpuAccelerator) as mended:
        meanwhile = _failure(build)
    return {"mended": mended, "before": before, "meanwhile": meanwhile, "after": _failure(build)}


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except InferenceShardformerError as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def _failure(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, RuntimeError) as exc:
        return type(exc).__name__
    return ""


CASES_OF_POLICIES: dict[str, Callable[..., object]] = {
    "own_mlp": own_mlp,
    "stock": stock,
    "forgetful": refused(ForgetfulPolicy()),
    "failing": refused(FailingPolicy()),
    "mending": mending,
}
