"""Seeded defects of policies: each names what a verifier must find, injected into a real policy's rows and modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.policies.base import Policy, ReplaceEntry, StyleEntry
from inference_shardformer.sharding.plan import ParameterPlan, PlanContext
from inference_shardformer.sharding.styles import Replicate, Style
from inference_shardformer.verification.checked import CheckedBackend

LAYER = "model.layers.1"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
QKV, OUT = f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj"
GATE_UP, DOWN = f"{MLP}.gate_up_proj", f"{MLP}.down_proj"
Edit = Callable[[ParameterPlan, PlanContext], ParameterPlan]
Break = Callable[[nn.Module, TensorParallelGroup], nn.Module | None]


@dataclass(frozen=True)
class Mutation:
    """One defect: how it is put into a policy, and the modules of which one must be named."""

    name: str
    inject: Callable[[Policy], Policy]
    expected: tuple[str, ...]
    case: str = "gqa"  # of tiny_models, or of family_models
    tp_size: int = 2


class EditedStyle(Style):
    """A style whose plan for one module is edited."""

    def __init__(self, inner: Style, path: str, edit: Edit) -> None:
        self._inner, self._path, self._edit = inner, path, edit
        self.name, self.sources, self.tied_to = inner.name, inner.sources, inner.tied_to  # type: ignore[misc]

    def plan(self, path: str, tensors: Any, context: PlanContext) -> tuple[ParameterPlan, ...]:
        planned = self._inner.plan(path, tensors, context)
        return tuple(self._edit(each, context) for each in planned) if path == self._path else planned


def in_table(policy: Policy, change: Callable[[Any], Any]) -> Policy:
    """The policy with every row of its table changed; `None` drops the row."""
    mutant = copy.copy(policy)
    native = policy.table
    mutant.table = lambda facts: tuple(  # type: ignore[method-assign]
        changed for entry in native(facts) if (changed := change(entry)) is not None
    )
    return mutant


def in_plan(path: str, edit: Edit) -> Callable[[Policy], Policy]:
    """Edit the parameter plans of one module."""

    def change(entry: Any) -> Any:
        if not isinstance(entry, StyleEntry) or not _matches(entry.row.pattern, path):
            return entry
        return replace(entry, row=replace(entry.row, style=EditedStyle(entry.row.style, path, edit)))

    return lambda policy: in_table(policy, change)


def in_style(path: str, style: Style) -> Callable[[Policy], Policy]:
    """Cut a row's modules in another style."""

    def change(entry: Any) -> Any:
        is_it = isinstance(entry, StyleEntry) and _matches(entry.row.pattern, path)
        return replace(entry, row=replace(entry.row, style=style)) if is_it else entry

    return lambda policy: in_table(policy, change)


def in_module(path: str, broken: Break) -> Callable[[Policy], Policy]:
    """Break the module built for one path; what `broken` returns takes its place."""

    def change(entry: Any) -> Any:
        if not _matches(entry.row.pattern, path):
            return entry
        inner = entry.build
        if isinstance(entry, ReplaceEntry):
            counts: dict[int, int] = {}
            number = int(path.split(".")[2]) if ".layers." in path else 0

            def build_replacement(native: nn.Module, children: Any, context: Any) -> nn.Module:
                built = inner(native, children, context)
                place = counts[context.group.rank] = counts.get(context.group.rank, -1) + 1
                return (broken(built, context.group) or built) if place == number else built

            return replace(entry, build=build_replacement)

        def build(module: Any, native: Any, context: Any) -> nn.Module:
            built = inner(module, native, context)
            return (broken(built, context.group) or built) if module.path == path else built

        return replace(entry, build=build)

    return lambda policy: in_table(policy, change)


def wrapped(change: Callable[..., Any]) -> Break:
    """Replace `forward(*args)` by `change(forward, *args)`."""

    def broken(module: nn.Module, group: TensorParallelGroup) -> None:
        forward = module.forward
        module.forward = lambda *args, **kwargs: change(forward, group, *args, **kwargs)  # type: ignore[method-assign]

    return broken


class OtherBackend(CheckedBackend):
    """A backend that does something else on the way."""

    def __init__(self, backend: Any, *, write: Any = None, attend: Any = None) -> None:
        super().__init__(backend)
        self._backend = backend
        self._write, self._attend = write, attend

    def write(self, k: Any, v: Any, cache: Any, meta: Any) -> None:
        k, v = (k, v) if self._write is None else self._write(k, v)
        self._backend.write(k, v, cache, meta)

    def attend(self, q: Any, cache: Any, meta: Any) -> Any:
        return self._backend.attend(q if self._attend is None else self._attend(q), cache, meta)


def other_backend(**hooks: Any) -> Break:
    """Give an attention module a backend with these hooks."""

    def broken(module: nn.Module, group: TensorParallelGroup) -> None:
        module.backend = OtherBackend(module.backend, **hooks)  # type: ignore[assignment]

    return broken


def attributes(**values: Any) -> Break:
    """Set attributes of a module; a function is given the present value."""

    def broken(module: nn.Module, group: TensorParallelGroup) -> None:
        for name, value in values.items():
            setattr(module, name, value(getattr(module, name)) if callable(value) else value)

    return broken


def alone(module: nn.Module, group: TensorParallelGroup) -> None:
    """Leave the collective out."""
    module._group = TensorParallelGroup.single(torch.device("cpu"))  # type: ignore[assignment]


def reversed_ranks(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
    """Take the part of the rank at the other end."""
    size, rank = context.layout
    if len(planned.shape) == 1 and planned.slices[0].stop - planned.slices[0].start == planned.shape[0] * size:
        return planned
    parts = []
    for part in planned.slices:
        width = part.stop - part.start
        shift = (size - 1 - 2 * rank) * width
        parts.append(part._replace(start=part.start + shift, stop=part.stop + shift))
    return replace(planned, slices=tuple(parts))


def shifted(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
    """Begin one row late where there is room."""
    return replace(
        planned,
        slices=tuple(
            part._replace(start=part.start + 1, stop=part.stop + 1) if part.start == 0 else part
            for part in planned.slices
        ),
    )


def from_tensor(old: str, new: str) -> Edit:
    """Fill from another tensor."""

    def edit(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
        return replace(
            planned, slices=tuple(part._replace(tensor=part.tensor.replace(old, new)) for part in planned.slices)
        )

    return edit


def interleaved(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
    """Take every tp-th row or column in place of a run of them."""
    size, rank = context.layout
    (whole,) = planned.slices
    width = whole.stop - whole.start
    parts = tuple(whole._replace(start=rank + i * size, stop=rank + i * size + 1, offset=i) for i in range(width))
    return replace(planned, slices=parts)


def swapped_sources(first: int, second: int) -> Edit:
    """Exchange two parts of a fused parameter that are of the same size."""

    def edit(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
        parts = list(planned.slices)
        a, b = parts[first], parts[second]
        parts[first], parts[second] = b._replace(offset=a.offset), a._replace(offset=b.offset)
        return replace(planned, slices=tuple(parts))

    return edit


def other_kv_heads(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
    """Hand out key/value heads that are fewer than the ranks in turn, not in runs."""
    rank, total = context.layout.tp_rank, context.facts.total_num_kv_heads
    head_dim = context.facts.head_dim
    parts = [planned.slices[0]]
    for part in planned.slices[1:]:
        start = rank % total * head_dim
        parts.append(part._replace(start=start, stop=start + head_dim))
    return replace(planned, slices=tuple(parts))


def late_rows(planned: ParameterPlan, context: PlanContext) -> ParameterPlan:
    """Put the vocabulary's rows behind one row of padding on the last rank."""
    (part,) = planned.slices
    room = planned.shape[0] - (part.stop - part.start)
    return replace(planned, slices=(part._replace(offset=1),)) if room else planned


def without_tie(policy: Policy) -> Policy:
    """A head of its own for a model whose head is the embedding."""
    mutant = copy.copy(policy)
    native = policy.table
    mutant.table = lambda facts: native(replace(facts, tie_word_embeddings=False))  # type: ignore[method-assign]
    mutant.optional_tensors = lambda facts: frozenset()  # type: ignore[method-assign]
    return mutant


def with_tie(policy: Policy) -> Policy:
    """The embedding as head of a model that has another."""
    mutant = copy.copy(policy)
    native = policy.table
    mutant.table = lambda facts: native(replace(facts, tie_word_embeddings=True))  # type: ignore[method-assign]
    return mutant


def without_row(path: str) -> Callable[[Policy], Policy]:
    """Forget a row of the table."""
    return lambda policy: in_table(policy, lambda entry: None if _matches(entry.row.pattern, path) else entry)


def with_facts(**values: Any) -> Callable[[Policy], Policy]:
    """Read a fact wrong."""

    def inject(policy: Policy) -> Policy:
        mutant = copy.copy(policy)
        native = policy.facts
        mutant.facts = lambda config: replace(  # type: ignore[method-assign]
            native(config),
            **{k: v(getattr(native(config), k)) if callable(v) else v for k, v in values.items()},
        )
        return mutant

    return inject


def wrong_decode_positions(forward: Any, group: Any, x: Any, position_ids: Any) -> Any:
    """One too many for tokens that are generated."""
    return forward(x, position_ids + (position_ids >= 11).long())


def without_residual(forward: Any, group: Any, hidden_states: Any) -> Any:
    """The norm wipes out what the layer adds to afterwards."""
    out = forward(hidden_states.clone())
    hidden_states.zero_()
    return out


def doubled(forward: Any, group: Any, x: Any) -> Any:
    """Add over the ranks again."""
    return group.all_reduce(forward(x))


def bias_everywhere(forward: Any, group: Any, x: Any) -> Any:
    """Every rank's bias is in the sum: all but one are too many."""
    return forward(x) + (group.size - 1) * forward.__self__.bias


def bias_nowhere(forward: Any, group: Any, x: Any) -> Any:
    return forward(x) - forward.__self__.bias


def on_rank_1(change: Callable[[Any], Any]) -> Break:
    """Change the output of one rank alone."""
    return wrapped(lambda forward, group, *args: change(forward(*args)) if group.rank == 1 else forward(*args))


def skipping_on_rank_1(module: nn.Module, group: TensorParallelGroup) -> None:
    """One rank does not take part."""
    if group.rank == 1:
        alone(module, group)


_LLAMA: Sequence[Mutation] = (
    Mutation("swapped shards of o_proj", in_plan(OUT, reversed_ranks), (OUT, ATTENTION)),
    Mutation("swapped shards of qkv", in_plan(QKV, reversed_ranks), (QKV, ATTENTION)),
    Mutation("swapped shards of gate and up", in_plan(GATE_UP, reversed_ranks), (GATE_UP, MLP)),
    Mutation("swapped shards of down_proj", in_plan(DOWN, reversed_ranks), (DOWN, MLP)),
    Mutation("swapped shards of the vocabulary", in_plan("lm_head", reversed_ranks), ("lm_head",)),
    Mutation("off by one in down_proj", in_plan(DOWN, shifted), (DOWN, MLP)),
    Mutation("off by one in qkv", in_plan(QKV, shifted), (QKV, f"{ATTENTION}.q_proj")),
    Mutation("interleaved columns of down_proj", in_plan(DOWN, interleaved), (DOWN, MLP)),
    Mutation("replicated down_proj", in_style(DOWN, Replicate()), (DOWN, MLP, "model.layers.0.mlp.down_proj")),
    Mutation("replicated o_proj", in_style(OUT, Replicate()), (OUT, "model.layers.0.self_attn.o_proj")),
    Mutation("q and k exchanged", in_plan(QKV, swapped_sources(0, 1)), (QKV, ATTENTION), "mha"),
    Mutation("k and v exchanged", in_plan(QKV, swapped_sources(1, 2)), (QKV, ATTENTION)),
    Mutation("gate and up exchanged", in_plan(GATE_UP, swapped_sources(0, 1)), (GATE_UP, MLP)),
    Mutation("k filled from v", in_plan(QKV, from_tensor("k_proj", "v_proj")), (QKV, f"{ATTENTION}.k_proj")),
    Mutation(
        "lost bias of qkv",
        in_plan(QKV, lambda p, c: replace(p, slices=()) if p.name.endswith("bias") else p),
        (QKV, f"{ATTENTION}.q_proj"),
        "biased",
    ),
    Mutation("bias added on each rank", in_module(OUT, wrapped(bias_everywhere)), (OUT,), "biased"),
    Mutation("bias of down_proj forgotten", in_module(DOWN, wrapped(bias_nowhere)), (DOWN,), "biased"),
    Mutation(
        "norm weight of another layer",
        in_plan(f"{LAYER}.input_layernorm", from_tensor("layers.1", "layers.0")),
        (f"{LAYER}.input_layernorm", "model.layers.0.input_layernorm"),
    ),
    Mutation(
        "weights of two norms exchanged",
        lambda policy: in_plan(f"{LAYER}.input_layernorm", from_tensor("input_layernorm", "post_attention_layernorm"))(
            in_plan(f"{LAYER}.post_attention_layernorm", from_tensor("post_attention_layernorm", "input_layernorm"))(
                policy
            )
        ),
        (f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"),
    ),
    Mutation(
        "wrong eps",
        in_module("model.layers.0.input_layernorm", attributes(eps=1e-5)),
        ("model.layers.0.input_layernorm",),
    ),
    Mutation("norm with an offset", in_module("model.norm", attributes(is_offset=True)), ("model.norm",)),
    Mutation("no all-reduce in o_proj", in_module(OUT, alone), (OUT,)),
    Mutation("no all-reduce in down_proj", in_module(DOWN, alone), (DOWN,)),
    Mutation("no all-reduce in the embedding", in_module("model.embed_tokens", alone), ("model.embed_tokens",)),
    Mutation("double all-reduce in down_proj", in_module(DOWN, wrapped(doubled)), (DOWN,)),
    Mutation("one rank skips an all-reduce", in_module(OUT, skipping_on_rank_1), (OUT,)),
    Mutation("one rank's sum is off", in_module(DOWN, on_rank_1(lambda out: out * 1.001)), (DOWN,), tp_size=4),
    Mutation(
        "vocabulary begins one late",
        in_module("model.embed_tokens", attributes(start=lambda s: s + 1, stop=lambda s: s + 1)),
        ("model.embed_tokens",),
    ),
    Mutation("padding before the vocabulary", in_plan("lm_head", late_rows), ("lm_head",), "odd_vocabulary"),
    Mutation("untied head", without_tie, ("lm_head",), "tied"),
    Mutation("tied head that is none", with_tie, ("lm_head",)),
    Mutation("scaled logits", in_module("lm_head", wrapped(lambda f, g, x: f(x) * 1.01)), ("lm_head",)),
    Mutation("undivided head count", in_module(ATTENTION, attributes(num_heads=8)), (ATTENTION,)),
    Mutation("undivided key/value heads", in_module(ATTENTION, attributes(num_kv_heads=4)), (ATTENTION,)),
    Mutation("wrong scale", in_module(ATTENTION, other_backend(attend=lambda q: q * 1.05)), (ATTENTION,)),
    Mutation(
        "wrong key/value head",
        in_module(ATTENTION, other_backend(write=lambda k, v: (k.flip(1), v.flip(1)))),
        (ATTENTION,),
    ),
    Mutation(
        "key/value heads in turn",
        in_plan(QKV, other_kv_heads),
        (QKV, ATTENTION),
        "gqa_fewer_kv_heads_than_ranks",
        4,
    ),
    Mutation(
        "keys are not kept",
        in_module(ATTENTION, other_backend(write=lambda k, v: (k, v) if len(k) > 3 else (0 * k, v))),
        (ATTENTION,),
    ),
    Mutation(
        "another layer's cache", in_module(ATTENTION, attributes(layer_idx=0)), (ATTENTION, "model.layers.0.self_attn")
    ),
    Mutation(
        "wrong positions in decode",
        in_module("model.rotary_emb", wrapped(wrong_decode_positions)),
        ("model.rotary_emb",),
    ),
    Mutation(
        "wrong rope base", in_module("model.rotary_emb", attributes(inv_freq=lambda f: f * 0.9)), ("model.rotary_emb",)
    ),
    Mutation(
        "sine and cosine exchanged",
        in_module(
            ATTENTION,
            wrapped(
                lambda f, g, *a, position_embeddings, **k: f(*a, position_embeddings=position_embeddings[::-1], **k)
            ),
        ),
        (ATTENTION,),
    ),
    Mutation(
        "no residual",
        in_module(f"{LAYER}.input_layernorm", wrapped(without_residual)),
        (LAYER, f"{LAYER}.input_layernorm"),
    ),
    Mutation(
        "wrong activation", in_module(GATE_UP, wrapped(lambda f, g, *a: f(*a).relu())), (MLP, GATE_UP, f"{MLP}.act_fn")
    ),
    Mutation("a silent MLP", in_module(MLP, wrapped(lambda f, g, x: f(x) * 0)), (MLP,)),
    Mutation(
        "a row is missing",
        without_row(f"{MLP}.down_proj"),
        (DOWN, MLP, "model.layers.0.mlp.down_proj", "model.layers.0.mlp"),
    ),
)
_FAMILIES: Sequence[Mutation] = (
    Mutation(
        "window off by one",
        with_facts(sliding_windows=lambda w: tuple(x and x - 1 for x in w)),
        ("model.layers.0.self_attn",),
        "mistral_window",
    ),
    Mutation("window forgotten", with_facts(sliding_windows=()), ("model.layers.0.self_attn",), "mistral_window"),
    Mutation("soft-cap forgotten", with_facts(attention_softcap=None), ("model.layers.0.self_attn",), "gemma2"),
    Mutation("default scale", with_facts(attention_scale=None), ("model.layers.0.self_attn",), "gemma2"),
    Mutation(
        "norm without its offset",
        in_module(f"{LAYER}.input_layernorm", attributes(is_offset=False)),
        (f"{LAYER}.input_layernorm",),
        "gemma2",
    ),
    Mutation(
        "norms of q and k exchanged",
        in_module(ATTENTION, lambda m, g: (setattr(m, "q_norm", m.k_norm), None)[1]),
        (ATTENTION, f"{ATTENTION}.q_norm"),
        "qwen3",
    ),
    Mutation("fewer experts", in_module(MLP, attributes(top_k=1)), (MLP,), "mixtral"),
    Mutation("weights of experts not normalised", in_module(MLP, attributes(normalises=False)), (MLP,), "mixtral"),
    Mutation("experts not added over ranks", in_module(MLP, alone), (MLP,), "qwen3_moe"),
)
MUTATIONS = {mutation.name: mutation for mutation in (*_LLAMA, *_FAMILIES)}


def _matches(pattern: str, path: str) -> bool:
    wanted, given = pattern.split("."), path.split(".")
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))
