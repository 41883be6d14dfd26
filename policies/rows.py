"""The vocabulary of a policy's table: one function for each kind of row."""

from __future__ import annotations

from torch import nn

from inference_shardformer.errors import PolicyError
from inference_shardformer.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from inference_shardformer.layers.linear import ColumnParallelLinear, RowParallelLinear
from inference_shardformer.policies.base import BuildContext, ReplaceEntry, ReplacementFactory, StyleEntry
from inference_shardformer.sharding.plan import ModulePlan
from inference_shardformer.sharding.planner import ReplaceRow, StyleRow
from inference_shardformer.sharding.styles import QKV, Column, Replicate, RowSplit, Vocab, padded_vocab_part


def replicate(pattern: str) -> StyleEntry:
    """Keep the native module, whole, on every rank."""
    return StyleEntry(StyleRow(pattern, Replicate()), _keep)


def column(pattern: str, *sources: str) -> StyleEntry:
    """Cut output features over ranks; with `sources`, fuse these sibling projections into one."""
    return StyleEntry(StyleRow(pattern, Column(sources)), _column)


def qkv(pattern: str, *sources: str) -> StyleEntry:
    """Fuse query, key and value projections and cut their heads over ranks."""
    return StyleEntry(StyleRow(pattern, QKV(sources)), _column)


def row(pattern: str) -> StyleEntry:
    """Cut input features over ranks and add the partial sums."""
    return StyleEntry(StyleRow(pattern, RowSplit()), _row)


def vocab_embedding(pattern: str) -> StyleEntry:
    """Cut the embedding's vocabulary over ranks, padded to equal parts."""
    return StyleEntry(StyleRow(pattern, Vocab()), _embedding)


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
    return native


def _shape(module: ModulePlan) -> tuple[int, int, bool]:
    """`out_features`, `in_features` and whether there is a bias."""
    by_leaf = {parameter.name.rpartition(".")[2]: parameter.shape for parameter in module.parameters}
    out_features, in_features = by_leaf["weight"]
    return out_features, in_features, "bias" in by_leaf


def _column(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    out_features, in_features, bias = _shape(module)
    return ColumnParallelLinear(in_features, out_features, bias=bias)


def _row(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    out_features, in_features, bias = _shape(module)
    return RowParallelLinear(in_features, out_features, bias=bias, group=context.group)


def _embedding(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    num_rows, hidden_size, _ = _shape(module)
    return VocabParallelEmbedding(num_rows, hidden_size, vocab_range=context.vocab_range, group=context.group)


def _head(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    if module.tied_to is not None:
        part = padded_vocab_part(context.facts.vocab_size, context.group.size)
        return ParallelLMHead(context.facts.hidden_size, part, bias=False)
    out_features, in_features, bias = _shape(module)
    return ParallelLMHead(in_features, out_features, bias=bias)
