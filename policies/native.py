"""Rows that keep Hugging Face's own modules and cut what they are made of; what drafted policies are written in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from inference_shardformer.errors import PolicyError, UnsupportedModelError
from inference_shardformer.layers.width_norm import WidthRMSNorm
from inference_shardformer.modeling.native_attention import paged_attention
from inference_shardformer.policies.base import BuildContext, ReplaceEntry, StyleEntry
from inference_shardformer.policies.rotary import LENGTH_DEPENDENT_ROPE_TYPES, rope_settings
from inference_shardformer.policies.rows import column, replace
from inference_shardformer.sharding.packed import PackedColumn, PackedQKV
from inference_shardformer.sharding.plan import ModulePlan, ParameterPlan, PlanContext, SourceSlice
from inference_shardformer.sharding.planner import StyleRow
from inference_shardformer.sharding.styles import Style, Tensors, module_leaves, rank_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PAGED = "inference_shardformer_paged"


@dataclass(frozen=True)
class Heads(Style):
    """Rows that belong to heads, in their order: a projection, or a norm with a weight for each head.

    `is_kv`: the heads are those of keys and values, which neighbouring ranks share where there are too few.
    """

    name: ClassVar[str] = "heads"
    is_kv: bool = False

    def plan(self, path: str, tensors: Tensors, context: PlanContext) -> tuple[ParameterPlan, ...]:
        """The rows of this rank's heads."""
        total = context.facts.total_num_kv_heads if self.is_kv else context.facts.total_num_heads
        first, count = rank_heads(total, *context.layout)
        plans = []
        for leaf, info in module_leaves(path, tensors).items():
            name = f"{path}.{leaf}"
            width, rest = divmod(info.shape[0], total)
            if rest:
                raise PolicyError(
                    f"{name} has {info.shape[0]} rows, which {total} heads do not share evenly",
                    remedy="use column(...) or replicate(...) for what does not belong to heads",
                )
            part = SourceSlice(name, 0, first * width, (first + count) * width, 0)
            plans.append(ParameterPlan(name, (count * width, *info.shape[1:]), (part,)))
        return tuple(plans)


def heads(pattern: str) -> StyleEntry:
    """Cut a projection to the heads of queries."""
    return StyleEntry(StyleRow(pattern, Heads()), column(pattern).build)


def kv_heads(pattern: str) -> StyleEntry:
    """Cut a projection to the heads of keys or values, copied where there are fewer than ranks."""
    return StyleEntry(StyleRow(pattern, Heads(is_kv=True)), column(pattern).build)


def head_norm(pattern: str, *, is_kv: bool) -> StyleEntry:
    """Keep a native norm that has a weight for every head, cut to the heads of this rank."""
    return StyleEntry(StyleRow(pattern, Heads(is_kv=is_kv)), _copy)


def width_norm(pattern: str, *, native_class: str, is_kv: bool) -> StyleEntry:
    """Exchange an RMSNorm of exactly `native_class` over all heads together for one whose ranks add their squares."""

    def build(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
        if type(native).__name__ != native_class:
            raise PolicyError(
                f"{module.path} is a {type(native).__name__}, but the policy replaces {native_class}",
                remedy="name its class in the row, if it is an RMSNorm as well",
            )
        total_heads = context.facts.total_num_kv_heads if is_kv else context.facts.total_num_heads
        eps = float(getattr(native, "variance_epsilon", None) or getattr(native, "eps"))  # noqa: B009  # either name
        return WidthRMSNorm(
            module.parameters[0].shape[0],
            total=total_heads * context.facts.head_dim,
            num_copies=max(1, context.group.size // total_heads),
            eps=eps,
            group=context.group,
        )

    return StyleEntry(StyleRow(pattern, Heads(is_kv=is_kv)), build)


def packed_column(pattern: str) -> StyleEntry:
    """Cut a projection that packs two of the same size, first and second half; the native module takes them apart."""
    return StyleEntry(StyleRow(pattern, PackedColumn()), column(pattern).build)


def native_packed_qkv(pattern: str) -> StyleEntry:
    """Cut a projection that packs all queries, then keys, then values; the native module takes them apart."""
    return StyleEntry(StyleRow(pattern, PackedQKV()), column(pattern).build)


def native_layer(pattern: str, *, native_class: str, attention: str) -> ReplaceEntry:
    """Keep native decoder layers that do not hand `attn_metadata` on to their attention, which is named here."""

    def build(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        clone = shallow_copy(native)
        for name, child in children.items():
            *above, leaf = name.split(".")
            parent = clone
            for step in above:  # modules on the way are copied too
                parent.add_module(step, shallow_copy(parent.get_submodule(step)))
                parent = parent.get_submodule(step)
            parent.add_module(leaf, child)
        receiver = clone.get_submodule(attention)
        clone.register_forward_pre_hook(partial(_hand_down, receiver), with_kwargs=True)
        clone.register_forward_hook(partial(_take_back, receiver))
        return clone

    return replace(pattern, native_class=native_class, build=build)


def native_rotary(pattern: str, *, native_class: str) -> ReplaceEntry:
    """Keep a native rotary embedding, with frequencies computed anew from the configuration."""
    return replace(pattern, native_class=native_class, build=_rotary)


def native_attention(
    pattern: str, *, native_class: str, head_counts: tuple[str, ...] = (), kv_head_counts: tuple[str, ...] = ()
) -> ReplaceEntry:
    """Keep a native attention module over the paged cache, made of this rank's projections.

    It must call Hugging Face's attention interface. `head_counts` and `kv_head_counts` name its attributes that count
    heads, which are set to those of this rank.
    """

    def build(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        _register()
        clone = shallow_copy(native)
        for name, child in children.items():
            clone.set_submodule(name, child)
        clone.backend = backend = context.backend_of(int(clone.layer_idx))  # type: ignore[assignment, arg-type]
        clone.config = copy.copy(clone.config)
        clone.config._attn_implementation = PAGED  # type: ignore[union-attr]
        for names, count in ((head_counts, backend.spec.num_heads), (kv_head_counts, backend.spec.num_kv_heads)):
            for name in names:
                setattr(clone, name, count)
        return clone

    return replace(pattern, native_class=native_class, build=build)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same children and parameters, so that the native one can stay as it is."""
    clone = copy.copy(module)
    for name, held in vars(module).items():
        if isinstance(held, dict) and name.startswith("_"):  # parameters, buffers, modules and hooks
            clone.__dict__[name] = copy.copy(held)
    return clone


def refuse_length_dependent_rope(hf_config: PreTrainedConfig, architecture: str) -> None:
    """Raise `UnsupportedModelError` for rope types whose native module remembers the longest sequence it met."""
    rope_type = rope_settings(hf_config)["rope_type"]
    if rope_type in LENGTH_DEPENDENT_ROPE_TYPES:
        raise UnsupportedModelError(
            f"{architecture} with rope_type={rope_type!r} is not served by a policy that keeps native modules",
            remedy="write a policy with rotary_from_native(...), if the model turns heads as LLaMA does",
        )


def _copy(module: ModulePlan, native: nn.Module | None, context: BuildContext) -> nn.Module:
    if native is None:
        raise PolicyError(f"no module stands at {module.path}", remedy="correct the pattern of the row")
    return shallow_copy(native)


def _rotary(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    refuse_length_dependent_rope(context.hf_config, context.facts.architecture)
    with torch.device("cpu"):
        return type(native)(config=context.hf_config).to(context.group.device)


def _hand_down(receiver: nn.Module, layer: nn.Module, args: object, kwargs: dict[str, object]) -> None:
    receiver.__dict__["attn_metadata"] = kwargs.get("attn_metadata")


def _take_back(receiver: nn.Module, layer: nn.Module, args: object, output: object) -> None:
    receiver.__dict__["attn_metadata"] = None


def _register() -> None:
    """Make the paged attention known to transformers, once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if PAGED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[PAGED] = paged_attention
