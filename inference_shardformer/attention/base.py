"""The contract of an attention backend: facts it is chosen by, one plan a step, write and attend a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NoReturn

import torch
from pydantic import BaseModel

from inference_shardformer.attention.capabilities import AttentionCapabilities, Feature, KVLayout
from inference_shardformer.attention.requirements import UNSOUND, capability_reasons
from inference_shardformer.attention.sizes import ANY_SIZE, Sizes
from inference_shardformer.attention.slot_writes import stores_by_slot
from inference_shardformer.attention.spec import AttentionSpec, Reason
from inference_shardformer.config.option_steps import OptionChange, OptionsStep, OptionsSteps
from inference_shardformer.errors import BackendUnavailableError
from inference_shardformer.kernels.e4m3 import store_rows
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache
from inference_shardformer.probing.requirement import Requirement

__all__ = [
    "ANY_SIZE",
    "AttentionBackend",
    "AttentionCapabilities",
    "AttentionMetadata",
    "AttentionSpec",
    "Feature",
    "KVLayout",
    "OptionChange",
    "OptionsStep",
    "RaggedBatch",
    "Reason",
    "Requirement",
    "Sizes",
    "stores_by_slot",
]


@dataclass(frozen=True)
class RaggedBatch:
    """One packed batch: prefill, chunked prefill and decode alike. Sequences with one query token come first.

    The lists repeat the tensors on the host, so that planning never waits for a device.
    """

    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1], start of each sequence's queries in the packed tokens
    seq_lens: torch.Tensor  # int32 [num_seqs], tokens visible to the last query, this step's tokens included
    block_tables: torch.Tensor  # int32 [num_seqs, max_blocks], unused entries are 0
    slot_mapping: torch.Tensor  # int64 [num_tokens], where each token's key and value are written
    host_query_lens: Sequence[int]  # [num_seqs], query tokens of each sequence in this step
    host_seq_lens: Sequence[int]  # [num_seqs], the same values as seq_lens
    num_decodes: int  # how many leading sequences have exactly one query token

    @property
    def num_seqs(self) -> int:
        """Number of sequences in the batch."""
        return len(self.host_seq_lens)

    @property
    def num_tokens(self) -> int:
        """Number of packed query tokens."""
        return int(self.slot_mapping.shape[0])


@dataclass(frozen=True)
class AttentionMetadata:
    """What every layer of one step shares. A backend subclasses it to carry its own plan."""

    batch: RaggedBatch
    kv_cache: PagedKVCache

    def of(self, layer_idx: int) -> AttentionMetadata:
        """What the backend of one layer planned: this, where one backend serves all layers."""
        return self


class AttentionBackend(ABC):
    """Paged, ragged, causal attention of layers with equal needs on one rank. Built once, before any weight is read.

    A subclass declares `name`, `contract_version` (what that number promises: `attention.contract`) and `capabilities`.
    Importing its module and declaring it do no work; whatever needs a library or a device happens in `__init__`.

    A backend with settings of its own declares them as `Options`, a frozen pydantic model that forbids extra names.
    Users set them as `attention.options.<name>.<option>`; they reach `__init__` as an `Options`. Without a
    declaration a backend is built with its spec alone.
    """

    name: ClassVar[str]
    contract_version: ClassVar[int]
    capabilities: ClassVar[AttentionCapabilities]
    Options: ClassVar[type[BaseModel] | None] = None
    options_version: ClassVar[int] = 1  # grows when an option is renamed, dropped or means something else
    options_steps: ClassVar[OptionsSteps] = MappingProxyType({})  # the step that leaves each older version
    requires: ClassVar[tuple[Requirement, ...]] = ()  # foreign libraries; each is probed before this is constructed

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        self.spec = spec
        self.options = options

    @property
    def can_capture(self) -> bool:
        """Whether it has `Feature.GRAPHS`."""
        return Feature.GRAPHS in self.capabilities.features

    @classmethod
    def reasons(cls, spec: AttentionSpec) -> list[Reason]:
        """Every reason why this backend cannot serve `spec`; an empty list means that it can. Has no side effects."""
        reasons = capability_reasons(cls.capabilities, spec)
        if any(reason.code in UNSOUND for reason in reasons):
            return reasons
        return reasons + cls.extra_reasons(spec)

    @classmethod
    def extra_reasons(cls, spec: AttentionSpec) -> list[Reason]:
        """What the declared facts cannot express; none by default. Asked only about specs with sound counts."""
        return []

    @abstractmethod
    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Prepare one step; every layer reuses the result."""

    @stores_by_slot
    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """Store this step's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, at the batch's slots.

        This is for the layout NHD; a backend that declares another one brings its own. One that does no more than
        this may be marked `stores_by_slot`: a kernel that turns keys and stores them in one go is then used instead.
        """
        store_rows(cache.keys.flatten(0, 1), meta.batch.slot_mapping, k)
        store_rows(cache.values.flatten(0, 1), meta.batch.slot_mapping, v)

    @abstractmethod
    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend to everything written so far: `[num_tokens, num_heads, head_dim]` in and out.

        Query `i` of a sequence with `n` query tokens and `s` visible tokens stands at position `s - n + i` and sees
        the positions up to its own.
        """

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As `attend`, with `sinks` `[num_heads]`: one more logit per head that takes its share and adds no value.

        Part of `Feature.SINKS`; a model calls it in place of `attend`.
        """
        self._lacks(Feature.SINKS)

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Metadata to capture a step of `num_decodes` decodes with; its tensors keep their addresses.

        Part of `Feature.GRAPHS`.
        """
        self._lacks(Feature.GRAPHS)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill what `plan_capture` returned, in place, for a batch of as many decodes.

        Part of `Feature.GRAPHS`.
        """
        self._lacks(Feature.GRAPHS)

    def _lacks(self, feature: Feature) -> NoReturn:
        raise BackendUnavailableError(
            f"attention backend {self.name!r} does not have the feature {feature.value}",
            remedy="ask for it in AttentionSpec.features, so that only backends that have it are chosen",
        )
