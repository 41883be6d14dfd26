"""Checks on what a backend changes and what it leaves alone: the cache, its inputs, the plan."""

from __future__ import annotations

import torch

from inference_shardformer.conformance.cases import Case
from inference_shardformer.conformance.check import Check, Notes, Subject
from inference_shardformer.conformance.problem import Problem, in_blocks
from inference_shardformer.conformance.trials import in_every_dtype
from inference_shardformer.conformance.verdicts import require, same_bits

Frozen = dict[str, torch.Tensor]  # copies of tensors by name


def _snapshot(problem: Problem) -> Frozen:
    """Copies of everything a backend is given."""
    batch, (keys, values), layer = problem.batch, problem.kv_cache.layer(0), problem.layers[0]
    given = {
        "q": layer.q,
        "k": layer.k,
        "v": layer.v,
        "cache.keys": keys,
        "cache.values": values,
        "batch.cu_seqlens_q": batch.cu_seqlens_q,
        "batch.seq_lens": batch.seq_lens,
        "batch.block_tables": batch.block_tables,
        "batch.slot_mapping": batch.slot_mapping,
        "batch.host_query_lens": torch.tensor(batch.host_query_lens),
        "batch.host_seq_lens": torch.tensor(batch.host_seq_lens),
    }
    return {name: tensor.clone() for name, tensor in given.items()}


def _changed(before: Frozen, problem: Problem) -> str:
    after = _snapshot(problem)
    return ", ".join(name for name in before if not same_bits(before[name], after[name]))


def _writes_named_slots(subject: Subject, case: Case) -> Notes | None:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    slots, layer, cache = problem.batch.slot_mapping, problem.layers[0], problem.kv_cache.layer(0)
    expected = [tensor.clone() for tensor in cache]
    blocks, offsets = in_blocks(slots, case.block_size)
    for tensor, given in zip(expected, (layer.k, layer.v), strict=True):
        problem.as_nhd(tensor)[blocks, offsets] = given.to(tensor.dtype)
    backend.write(layer.k, layer.v, cache, backend.plan(problem.batch, problem.kv_cache))
    for name, tensor, right in zip(("keys", "values"), cache, expected, strict=True):
        wrong = ~torch.isclose(tensor.float(), right.float(), rtol=0, atol=0, equal_nan=True)
        wrong = problem.as_nhd(wrong).flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        touched = sorted(set(wrong.flatten(1).any(dim=1).nonzero().flatten().tolist()))
        named = set(slots.tolist())
        strays = [slot for slot in touched if slot not in named]
        require(not strays, f"write changed {name} in slots that the batch does not name: {strays[:8]}")
        require(not touched, f"write left wrong {name} in the named slots {touched[:8]}")
    return None


def _ignores_stale_slots(subject: Subject, case: Case) -> Notes | None:
    """What lies in slots that no sequence owns is NaN once and a large number once; neither may show."""
    __tracebackhide__ = True
    results = []
    for poison in (torch.nan, 3e4, 0.0):
        backend, problem = subject.build(case), subject.problem(case, poison=poison)
        results.append(problem.step(backend))
    require(
        all(same_bits(results[0], other) for other in results[1:]),
        "the result depends on slots that no sequence of the batch owns (past its end, or of other blocks)",
    )
    return None


def _plan_is_pure(subject: Subject, case: Case) -> Notes | None:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    before = _snapshot(problem)
    backend.plan(problem.batch, problem.kv_cache)
    changed = _changed(before, problem)
    require(not changed, f"plan changed {changed}")
    return None


def _write_reads_only(subject: Subject, case: Case) -> Notes | None:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    meta = backend.plan(problem.batch, problem.kv_cache)
    before, layer = _snapshot(problem), problem.layers[0]
    backend.write(layer.k, layer.v, problem.kv_cache.layer(0), meta)
    changed = [name for name in _changed(before, problem).split(", ") if name and not name.startswith("cache.")]
    require(not changed, f"write changed {', '.join(changed)}")
    return None


def _attend_is_pure(subject: Subject, case: Case) -> Notes | None:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    meta, layer, cache = backend.plan(problem.batch, problem.kv_cache), problem.layers[0], problem.kv_cache.layer(0)
    backend.write(layer.k, layer.v, cache, meta)
    before = _snapshot(problem)
    backend.attend(layer.q, cache, meta)
    changed = _changed(before, problem)
    require(not changed, f"attend changed {changed}")
    return None


def _one_plan_for_all_layers(subject: Subject, case: Case) -> Notes | None:
    """Three layers of different contents, then the first one again."""
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case, num_layers=3)
    meta = backend.plan(problem.batch, problem.kv_cache)
    for layer_idx in (0, 1, 2, 0):
        subject.require_right(case, problem.step(backend, meta, layer_idx), problem, layer_idx)
    return None


def _sliced_inputs(subject: Subject, case: Case) -> Notes:
    """Queries, keys and values as views into one fused projection, which is what models hand over."""
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    layer = problem.layers[0]
    fused = torch.cat([layer.q, layer.k, layer.v], dim=1)
    layer.q, layer.k, layer.v = fused.split([layer.q.shape[1], layer.k.shape[1], layer.v.shape[1]], dim=1)
    return subject.require_right(case, problem.step(backend), problem)


def _inside_and_outside(subject: Subject, case: Case) -> Notes:
    __tracebackhide__ = True
    backend, problem = subject.build(case), subject.problem(case)
    with torch.inference_mode():
        meta = backend.plan(problem.batch, problem.kv_cache)
        subject.require_right(case, problem.step(backend, meta), problem)
    return subject.require_right(case, problem.step(backend, meta), problem)


CHECKS = (
    Check(
        "writes_only_the_named_slots",
        "write() stores keys and values at the batch's slots and touches no other.",
        in_every_dtype(_writes_named_slots),
    ),
    Check(
        "ignores_stale_slots",
        "What other sequences left in the cache has no influence.",
        in_every_dtype(_ignores_stale_slots),
    ),
    Check("plan_changes_nothing", "plan() leaves cache and batch alone.", in_every_dtype(_plan_is_pure)),
    Check("write_keeps_its_inputs", "write() changes the cache only.", in_every_dtype(_write_reads_only)),
    Check("attend_changes_nothing", "attend() changes nothing it is given.", in_every_dtype(_attend_is_pure)),
    Check("one_plan_serves_every_layer", "A plan is made once a step.", in_every_dtype(_one_plan_for_all_layers)),
    Check("takes_views", "Inputs may be views into a fused projection.", in_every_dtype(_sliced_inputs)),
    Check(
        "works_in_and_out_of_inference_mode",
        "A plan made in inference mode serves outside of it too.",
        in_every_dtype(_inside_and_outside),
    ),
)
