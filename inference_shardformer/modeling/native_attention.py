"""The attention function that a Hugging Face attention module calls when it stays as it is: paged, ragged, bound."""

from __future__ import annotations

import math

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.errors import PolicyError

_IGNORED = frozenset(  # what Hugging Face's models hand down that the packed batch says better, or that inference lacks
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attn_metadata: AttentionMetadata | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attention by the backend that `module` holds. `query`, `key` and `value` are `[1, heads, num_tokens, head_dim]`.

    The packed batch comes as `attn_metadata`, or lies on the module where its layer hands nothing on. Returns
    `[1, num_tokens, heads, head_dim]`. Raises `PolicyError` where the module asks for other attention than the
    backend was chosen for, or for something that is not known here: nothing is dropped in silence.
    """
    backend, layer_idx = module.backend, int(module.layer_idx)  # type: ignore[arg-type]
    if not isinstance(backend, AttentionBackend):
        raise TypeError(f"{type(module).__name__} of layer {layer_idx} holds no attention backend")
    attn_metadata = attn_metadata or getattr(module, "attn_metadata", None)
    if attn_metadata is None:
        raise PolicyError(
            f"{type(module).__name__} of layer {layer_idx} was not given attn_metadata: the layer around it keeps its "
            "keyword arguments to itself",
            remedy="add a row native_layer(...) for the layer",
        )
    _check(type(module).__name__, backend, scaling, sliding_window, softcap)
    unknown = [name for name, given in others.items() if name not in _IGNORED and given is not None]
    if unknown:
        raise PolicyError(
            f"{type(module).__name__} hands {', '.join(sorted(unknown))} to its attention, which is not served",
            remedy="write a module for this attention, and replace(...) the native one with it",
        )
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))  # [num_tokens, heads, head_dim]
    cache, meta = attn_metadata.kv_cache.layer(layer_idx), attn_metadata.of(layer_idx)
    backend.write(k, v, cache, meta)
    return backend.attend(q, cache, meta).unsqueeze(0), None


def _check(
    name: str, backend: AttentionBackend, scaling: float | None, sliding_window: int | None, softcap: float | None
) -> None:
    spec = backend.spec
    asked = {
        "scale": (spec.head_dim**-0.5 if scaling is None else float(scaling), spec.scale),
        "sliding window": (float(sliding_window or 0), float(spec.sliding_window or 0)),
        "softcap": (float(softcap or 0), float(spec.softcap or 0)),
    }
    for what, (native, bound) in asked.items():
        if not math.isclose(native, bound, rel_tol=1e-6):
            raise PolicyError(
                f"{name} asks for a {what} of {native:g}, and the policy's facts say {bound:g}",
                remedy="correct attention_scale, sliding_windows or attention_softcap in the policy's facts()",
            )
