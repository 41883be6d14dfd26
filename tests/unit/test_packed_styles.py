"""Styles for packed checkpoint tensors: what each rank holds, by plain indexing, and what is refused."""

from __future__ import annotations

import pytest
import torch

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import PolicyError
from inference_shardformer.sharding.checkpoint import StateDictSource
from inference_shardformer.sharding.packed import InterleavedQKV, PackedColumn, PackedQKV
from inference_shardformer.sharding.plan import ParameterPlan, PlanContext, RankLayout, TensorInfo
from inference_shardformer.sharding.styles import RowSplit, Style

HEADS, HEAD_DIM, HIDDEN = 4, 3, 12


def _context(tp_size: int, tp_rank: int, *, kv_heads: int = HEADS) -> PlanContext:
    facts = ModelFacts(
        architecture="Some",
        model_type="some",
        vocab_size=7,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_layers=1,
        total_num_heads=HEADS,
        total_num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=8,
        eos_token_ids=(),
        tie_word_embeddings=False,
        checkpoint_dtype=None,
    )
    return PlanContext(facts, RankLayout(tp_size, tp_rank))


def _held(style: Style, tensors: dict[str, torch.Tensor], context: PlanContext) -> dict[str, torch.Tensor]:
    """The parameters of the module `a.proj` on one rank."""
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    return {plan.name: _filled(plan, tensors) for plan in style.plan("a.proj", infos, context)}


def _filled(plan: ParameterPlan, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    source, target = StateDictSource(tensors), torch.full(plan.shape, float("nan"))
    for part in plan.slices:
        (_, piece), *_ = source.chunks(part)
        target.narrow(part.dim, part.offset, part.stop - part.start).copy_(piece)
    return target


def _tensors(rows: int, name: str = "a.proj") -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    return {f"{name}.weight": torch.randn(rows, HIDDEN), f"{name}.bias": torch.randn(rows)}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_gate_and_up_are_cut_each_by_itself(tp_size: int, leaf: str) -> None:
    tensors = _tensors(16)
    ranks = [_held(PackedColumn(), tensors, _context(tp_size, rank))[f"a.proj.{leaf}"] for rank in range(tp_size)]
    gate, up = tensors[f"a.proj.{leaf}"].split(8)
    assert torch.equal(torch.cat([rank.chunk(2)[0] for rank in ranks]), gate)
    assert torch.equal(torch.cat([rank.chunk(2)[1] for rank in ranks]), up)


@pytest.mark.parametrize(("tp_size", "kv_heads"), [(1, 4), (2, 4), (4, 4), (2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_packed_heads_are_cut_and_few_key_heads_copied(tp_size: int, kv_heads: int, leaf: str) -> None:
    tensors = _tensors((HEADS + 2 * kv_heads) * HEAD_DIM)
    packed = tensors[f"a.proj.{leaf}"].unflatten(0, (-1, HEAD_DIM))
    q, k, v = packed.split((HEADS, kv_heads, kv_heads))
    for rank in range(tp_size):
        held = _held(PackedQKV(), tensors, _context(tp_size, rank, kv_heads=kv_heads))[f"a.proj.{leaf}"]
        own_heads = range(rank * HEADS // tp_size, (rank + 1) * HEADS // tp_size)
        own = sorted({head * kv_heads // HEADS for head in own_heads})
        expected = torch.cat([q.chunk(tp_size)[rank], k[own], v[own]]).flatten(0, 1)
        assert torch.equal(held, expected)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_interleaved_heads_are_held_apart(tp_size: int, leaf: str) -> None:
    tensors = _tensors(3 * HEADS * HEAD_DIM)
    by_head = tensors[f"a.proj.{leaf}"].unflatten(0, (HEADS, 3, HEAD_DIM))
    for rank in range(tp_size):
        held = _held(InterleavedQKV(), tensors, _context(tp_size, rank))[f"a.proj.{leaf}"]
        own = by_head.chunk(tp_size)[rank]
        assert torch.equal(held, own.transpose(0, 1).flatten(0, 2))


def test_a_source_of_another_name() -> None:
    tensors = _tensors(16, "a.native")
    held = _held(PackedColumn(("native",)), tensors, _context(1, 0))
    assert torch.equal(held["a.proj.weight"], tensors["a.native.weight"])
    held = _held(RowSplit(("native",)), tensors, _context(2, 1))
    assert torch.equal(held["a.proj.weight"], tensors["a.native.weight"][:, HIDDEN // 2 :])
    assert torch.equal(held["a.proj.bias"], tensors["a.native.bias"])


@pytest.mark.parametrize(
    ("style", "rows", "kv_heads", "said"),
    [
        (PackedColumn(), 15, 4, "15 rows are not 2 parts"),
        (PackedColumn(), 18, 4, "tp_size=2"),
        (PackedQKV(), 35, 4, "12 packed heads of head_dim=3 need 36"),
        (InterleavedQKV(), 35, 4, "12 packed heads of head_dim=3 need 36"),
        (InterleavedQKV(), 36, 2, "the model has 2 key/value heads"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(style: Style, rows: int, kv_heads: int, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        _held(style, _tensors(rows), _context(2, 0, kv_heads=kv_heads))
