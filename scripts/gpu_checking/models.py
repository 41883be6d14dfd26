"""Model shapes, made with random weights on the device: nothing is downloaded, nothing passes through the host."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

_COMMON = {"max_position_embeddings": 8192, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
SHAPES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LLaMA of a known shape; weights are spread so that greedy choices are no near-ties."""
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **_COMMON)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2 if shape == "tiny" else 0.02)
    model.generation_config.eos_token_id = None
    return model


def make_family(name: str, device: torch.device) -> PreTrainedModel:
    """A tiny model in fp32 beside LLaMA: "mixtral" with six experts, or "longrope"."""
    torch.manual_seed(0)
    sizes = {**SHAPES["tiny"], **_COMMON, "max_position_embeddings": 256}
    rope = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * index for index in range(8)]}
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}
    made: dict[str, Callable[[], PreTrainedModel]] = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**sizes, **experts)),
        "longrope": lambda: LlamaForCausalLM(LlamaConfig(**sizes, rope_scaling=rope)),
    }
    with torch.device(device):
        model = made[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = None
    return model


def read_bytes_per_token(model: LlamaForCausalLM) -> int:
    """Bytes of weights that one decode step must read: all but the embedding rows of other tokens."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    tied = model.config.tie_word_embeddings
    return total if tied else total - model.get_input_embeddings().weight.nbytes


def prefill_flops(model: LlamaForCausalLM, num_tokens: int) -> int:
    """Operations of the projections for a prompt; the head serves its last token alone."""
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    total = sum(parameter.numel() for parameter in model.parameters())
    return 2 * num_tokens * (total - embedding * (1 if tied else 2))


def free_memory(device: torch.device) -> None:
    """Give back what was dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
