"""Reads a table of rows from the module tree of a decoder; what cannot be told becomes an open question."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import nn

from inference_shardformer.drafting.attention import (
    Heads,
    Packing,
    attention_row,
    is_attention,
    layer_row,
    projection_row,
    scale_source,
    windows_source,
)
from inference_shardformer.drafting.mlp import mlp_row
from inference_shardformer.drafting.rows import DraftFacts, DraftRow, DraftTable
from inference_shardformer.drafting.tree import Kind, kinds_of, tensor_parallel_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INTERMEDIATE = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size")
_REFUSED_FIELDS = ("alibi", "attention_chunk_size", "is_encoder_decoder", "use_alibi", "new_decoder_architecture")


def analyse(model: PreTrainedModel, packing: Packing = "") -> DraftTable:
    """The drafted table of a model, which may be on the meta device; `packing` is a guess at packed projections."""
    kinds, undecided = kinds_of(model), []
    heads, plan = Heads(model.config), tensor_parallel_plan(model)
    attentions = [kind for kind in kinds.values() if is_attention(kind)]
    rows: list[DraftRow] = []
    for kind in kinds.values():
        found = _row(kind, model, attentions, heads, plan, packing)
        if isinstance(found, DraftRow):
            rows.append(found)
        elif found:
            undecided.append(found)
        if len(kind.class_names) > 1 and (kind.shapes or kind in attentions):
            undecided.append(f"{kind.pattern} is of several classes: {', '.join(kind.class_names)}")
    if len(attentions) != 1:
        names = ", ".join(kind.pattern for kind in attentions) or "none"
        undecided.append(f"one kind of attention is needed, found {names}")
    refused = [name for name in _REFUSED_FIELDS if getattr(model.config, name, None)]
    undecided += [f"config.{name}={getattr(model.config, name)!r} changes what attention sees" for name in refused]
    facts = _facts(model, attentions[0], heads, undecided) if len(attentions) == 1 else DraftFacts()
    return DraftTable(type(model).__name__, tuple(rows), facts, tuple(undecided))


def _row(
    kind: Kind,
    model: PreTrainedModel,
    attentions: list[Kind],
    heads: Heads,
    plan: Mapping[str, str],
    packing: Packing,
) -> DraftRow | str | None:
    """The row of one kind; a text where it needs one that cannot be told, `None` where it needs none."""
    if kind in attentions:
        return f"{kind.pattern} holds {sorted(kind.shapes)} itself" if kind.shapes else attention_row(kind, heads)
    if any(kind.pattern.startswith(f"{attention.pattern}.") for attention in attentions):
        return projection_row(kind, heads, plan, packing) if kind.shapes else None
    for attention in attentions:
        if kind.pattern == attention.parent:
            return layer_row(kind, attention)
    if _is_rotary(kind):
        return _rotary_row(kind)
    if kind.first is model.get_input_embeddings():
        return _embedding_row(kind, model)
    if _has_lost_buffers(kind):
        return f"{kind.pattern}: a {type(kind.first).__name__} computes buffers that no row here rebuilds"
    if not kind.shapes:
        return None
    if kind.first is model.get_output_embeddings():
        return _head_row(kind, model)
    return mlp_row(kind, model.config, plan)


def _is_rotary(kind: Kind) -> bool:
    names = [name for name, _ in kind.first.named_buffers(recurse=False)]
    return "rotary" in type(kind.first).__name__.lower() and any(name.endswith("inv_freq") for name in names)


def _rotary_row(kind: Kind) -> DraftRow | str:
    name = type(kind.first).__name__
    if "config" not in inspect.signature(type(kind.first).__init__).parameters:
        return f"{kind.pattern}: a {name} is not made from a configuration alone"
    reason = "its frequencies come from the configuration"
    return DraftRow("native_rotary", kind.pattern, "certain", reason, (("native_class", f'"{name}"'),))


def _has_lost_buffers(kind: Kind) -> bool:
    """Buffers are left without a value when a model is built without memory, and rows plan parameters alone."""
    return any(True for _ in kind.first.named_buffers(recurse=False))


def _embedding_row(kind: Kind, model: PreTrainedModel) -> DraftRow | str:
    if type(kind.first) is nn.Embedding:
        return DraftRow("vocab_embedding", kind.pattern, "certain", "the embedding of tokens")
    if "Scaled" in type(kind.first).__name__:
        arguments = (("scaled_class", f'"{type(kind.first).__name__}"'),)
        reason = "the embedding of tokens, taken to be scaled by the root of the hidden size"
        return DraftRow("scaled_vocab_embedding", kind.pattern, "likely", reason, arguments)
    if _has_lost_buffers(kind) or _tied_path(model) is not None:
        return f"{kind.pattern} is a {type(kind.first).__name__}, which no row here cuts or rebuilds"
    return DraftRow("replicate", kind.pattern, "likely", f"a {type(kind.first).__name__}, kept whole on every rank")


def _head_row(kind: Kind, model: PreTrainedModel) -> DraftRow | str:
    if type(kind.first) is not nn.Linear:
        return f"{kind.pattern}: the output head is a {type(kind.first).__name__}"
    tied = _tied_path(model)
    if tied is not None and not model.config.tie_word_embeddings:
        return f"{kind.pattern} shares its weight, which the configuration denies"
    path = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    source = f'"{path}" if facts.tie_word_embeddings else None'
    return DraftRow("vocab_head", kind.pattern, "certain", "the output head", (("tied_to", source),))


def _tied_path(model: PreTrainedModel) -> str | None:
    """The path of the output head if it shares the embedding's weight, or will once it is loaded."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and cast("nn.Linear", head).weight is cast("nn.Embedding", embedding).weight
    return "lm_head" if is_tied or model.config.tie_word_embeddings else None


def _facts(model: PreTrainedModel, attention: Kind, heads: Heads, undecided: list[str]) -> DraftFacts:
    config = model.config
    size = next((name for name in _INTERMEDIATE if isinstance(getattr(config, name, None), int)), None)
    windows = windows_source(config, attention)
    scale = scale_source(config, attention, heads)
    if size is None:
        undecided.append("no field of the configuration tells the width of the MLP")
    if windows is None:
        undecided.append("the sliding windows of the layers are not what the configuration says")
    if scale is None:
        undecided.append("the scale of the attention scores comes from no field of the configuration")
    softcap = "attn_logit_softcapping"
    return DraftFacts(
        intermediate_size=size or "intermediate_size",
        sliding_windows=windows or "no_windows(hf_config)",
        attention_scale=scale or None,
        attention_softcap=f"hf_config.{softcap}" if getattr(config, softcap, None) else None,
    )
