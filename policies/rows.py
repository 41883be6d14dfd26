"""The vocabulary of a policy's table: one function for each kind of row."""

from __future__ import annotations

import copy

import torch
from torch import nn

from inference_shardformer.compute.linear import LinearShape, LinearWeight
from inference_shardformer.compute.torch_kernels import PlainWeight
from inference_shardformer.errors import PolicyError
from inference_shardformer.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from inference_shardformer.layers.linear import ColumnParallelLinear, GateUpParallelLinear, RowParallelLinear
from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.layers.scaled_embedding import ScaledVocabParallelEmbedding
from inference_shardformer.policies.base import BuildContext, ReplaceEntry, ReplacementFactory, StyleEntry
from inference_shardformer.sharding.packed import InterleavedQKV, PackedColumn, PackedQKV
from inference_shardformer.sharding.plan import ModulePlan
from inference_shardformer.sharding.planner import ReplaceRow, StyleRow
from inference_shardformer.sharding.styles import (
    QKV,
    Column,
    GateUp,
    PartialRowSplit,
    Replicate,
    RowSplit,
    Vocab,
    padded_vocab_part,
)


def replicate(pattern: str) -> StyleEntry:
    """Keep the native module, whole, on every rank."""
    return StyleEntry(StyleRow(pattern, Replicate()), _keep)


def column(pattern: str, *sources: str) -> StyleEntry:
    """Cut output features over ranks; with `sources`, fuse these sibling projections into one."""
    return StyleEntry(StyleRow(pattern, Column(sources)), _column)


def gate_up(pattern: str, *sources: str) -> StyleEntry:
    """Fuse gate and up projection, gate first, cut their features over ranks, and apply the activation in between."""
    return StyleEntry(StyleRow(pattern, GateUp(sources)), _gate_up)


def rms_norm(pattern: str, *, native_class: str, is_offset: bool = False) -> StyleEntry:
    """Exchange norms of exactly `native_class`, whole on every rank; `is_offset`: the weight is stored less one."""

    def build(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
        if type(native).__name__ != native_class:
            raise PolicyError(
                f"{module.path} is a {type(native).__name__}, but the policy replaces {native_class}",
                remedy=f"keep it with replicate({pattern!r}), or name its class in the row",
            )
        (size,) = module.parameters[0].shape
        eps = float(getattr(native, "variance_epsilon", None) or getattr(native, "eps"))  # noqa: B009  # either name
        return RMSNorm(size, eps=eps, kernel=context.kernels.norm, is_offset=is_offset)

    return StyleEntry(StyleRow(pattern, Replicate()), build)


def qkv(pattern: str, *sources: str) -> StyleEntry:
    """Fuse query, key and value projections and cut their heads over ranks."""
    return StyleEntry(StyleRow(pattern, QKV(sources)), _column)


def packed_gate_up(pattern: str, *source: str) -> StyleEntry:
    """As `gate_up`, of a checkpoint that keeps both in one tensor; `source` is the sibling's name if it is another."""
    return StyleEntry(StyleRow(pattern, PackedColumn(source)), _gate_up)


def packed_qkv(pattern: str, *source: str) -> StyleEntry:
    """As `qkv`, of a checkpoint that keeps all in one tensor: queries, then keys, then values."""
    return StyleEntry(StyleRow(pattern, PackedQKV(source)), _column)


def interleaved_qkv(pattern: str, *source: str) -> StyleEntry:
    """As `qkv`, of a checkpoint that keeps query, key and value of each head together."""
    return StyleEntry(StyleRow(pattern, InterleavedQKV(source)), _column)


def row(pattern: str, *source: str) -> StyleEntry:
    """Cut input features over ranks and add the partial sums; `source` is the sibling's name if it is another."""
    return StyleEntry(StyleRow(pattern, RowSplit(source)), _row)


def partial_row(pattern: str, *source: str) -> StyleEntry:
    """As `row`, leaving it to the module above to add the partial sums."""
    return StyleEntry(StyleRow(pattern, PartialRowSplit(source)), _column)


def vocab_embedding(pattern: str) -> StyleEntry:
    """Cut the embedding's vocabulary over ranks, padded to equal parts."""
    return StyleEntry(StyleRow(pattern, Vocab()), _embedding)


def scaled_vocab_embedding(pattern: str, *, scaled_class: str) -> StyleEntry:
    """As `vocab_embedding`, times the native module's scale where it is a `scaled_class`.

    In older transformers it is a plain embedding, and the model multiplies.
    """

    def build(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
        if type(native) is nn.Embedding:
            return _embedding(module, native, context)
        if type(native).__name__ != scaled_class:
            raise PolicyError(
                f"{module.path} is a {type(native).__name__}, but the policy replaces {scaled_class}",
                remedy="name its class in the row, if it multiplies by a scale as well",
            )
        return ScaledVocabParallelEmbedding(
            _table_weight(module, context),
            vocab_range=context.vocab_range,
            group=context.group,
            scale=_scale_of(native, context.facts.hidden_size**0.5),
        )

    return StyleEntry(StyleRow(pattern, Vocab()), build)


def vocab_head(pattern: str, *, tied_to: str | None) -> StyleEntry:
    """Cut the output head's vocabulary over ranks; `tied_to` names the embedding whose weight it shares."""
    return StyleEntry(StyleRow(pattern, Vocab(tied_to)), _head)


def replace(pattern: str, *, native_class: str, build: ReplacementFactory) -> ReplaceEntry:
    """Exchange modules of exactly `native_class`; any other class there is refused by name."""
    return ReplaceEntry(ReplaceRow(pattern), native_class, build)


def _keep(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    if native is None:
        raise PolicyError(
            f"the row {module.row!r} keeps {module.path}, but no module stands there",
            remedy="replicate(...) keeps native modules; build a new one with column(...) or row(...)",
        )
    twin = copy.copy(native)  # the sharded model's parameters are its own: the native module waits for unshard
    twin._parameters, twin._buffers = copy.copy(native._parameters), copy.copy(native._buffers)
    return twin


def _check_class(module: ModulePlan, native: nn.Module | None, expected: type[nn.Module]) -> None:
    """Refuse what only derives from a plain module: what it does differently would be lost."""
    if native is not None and type(native) is not expected:
        raise PolicyError(
            f"{module.path} is a {type(native).__name__}, but the policy replaces {expected.__name__}",
            remedy="use a policy with a row that builds what the class does",
        )


def _linear(module: ModulePlan, context: BuildContext, *, is_gated: bool = False) -> tuple[LinearWeight, bool]:
    """The empty weight of one planned path, by the bound kernel, and whether there is a bias."""
    by_leaf = {parameter.name.rpartition(".")[2]: parameter.shape for parameter in module.parameters}
    out_features, in_features = by_leaf["weight"]
    return _weight(in_features, out_features, context, is_gated=is_gated), "bias" in by_leaf


def _weight(in_features: int, out_features: int, context: BuildContext, **kind: bool) -> LinearWeight:
    kernel = context.kernels.linear
    return kernel.weight(LinearShape(in_features, out_features, kernel.spec.dtype, **kind))


def _column(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    weight, bias = _linear(module, context)
    return ColumnParallelLinear(weight, bias=bias)


def _gate_up(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    weight, bias = _linear(module, context, is_gated=True)
    return GateUpParallelLinear(weight, bias=bias, activation=context.kernels.activation)


def _row(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    weight, bias = _linear(module, context)
    return RowParallelLinear(weight, bias=bias, group=context.group)


def _table_weight(module: ModulePlan, context: BuildContext) -> LinearWeight:
    """A table that is also the output head is stored for the linear kernel, so that there is one copy of it."""
    num_rows, hidden_size = module.parameters[0].shape
    if context.facts.tie_word_embeddings:
        return _weight(hidden_size, num_rows, context, is_table=True)
    return PlainWeight(LinearShape(hidden_size, num_rows, context.kernels.linear.spec.dtype, is_table=True))


def _embedding(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    _check_class(module, native, nn.Embedding)
    weight = _table_weight(module, context)
    return VocabParallelEmbedding(weight, vocab_range=context.vocab_range, group=context.group)


def _scale_of(native: nn.Module | None, usual: float) -> float:
    """What a scaled embedding multiplies by. Older releases keep it in a buffer, which has no value before loading."""
    scale = getattr(native, "scalar_embed_scale", getattr(native, "embed_scale", usual))
    if isinstance(scale, torch.Tensor):
        return usual if scale.is_meta else float(scale)
    return float(scale)


def _head(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    """A tied head uses the table's own weight, but for quantised weights: then it keeps a quantised copy."""
    _check_class(module, native, nn.Linear)
    if module.tied_to is not None:
        part = padded_vocab_part(context.facts.vocab_size, context.group.size)
        is_table = context.kernels.linear.spec.quantization is None
        weight = _weight(context.facts.hidden_size, part, context, is_table=is_table)
        return ParallelLMHead(weight, bias=bool(module.parameters))
    weight, bias = _linear(module, context)
    return ParallelLMHead(weight, bias=bias)
