"""Captured decode steps: the work of a padded batch is recorded once and replayed with other numbers in its tensors."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch

from inference_shardformer.attention.base import AttentionMetadata, RaggedBatch
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.engine.batch import ForwardBatch
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.kv_cache.cache import PagedKVCache

Step = Callable[[], torch.Tensor]
"""The work of a step on tensors that stay where they are; returns the logits."""
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, torch.Tensor], torch.Tensor]
"""Token ids, positions, metadata and indices of the logits to the logits; what an eager step runs, too."""


_log = logging.getLogger(__name__)


class Recording(NamedTuple):
    """A recorded step. `replay` runs it again on what its input tensors hold by then, into `logits`."""

    replay: Callable[[], None]
    logits: torch.Tensor


class Recorder(Protocol):
    """What records steps. The step may run several times, the last one counts; all must have the same effect."""

    def __call__(self, step: Step) -> Recording:
        """Record one step."""


class CapturablePlanner(Protocol):
    """Attention backends whose plans of decode steps can be captured."""

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Metadata whose tensors keep their addresses."""

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill it for another batch of as many decodes."""


@dataclass(frozen=True)
class _Captured:
    """One recorded batch size with the tensors it reads."""

    input_ids: torch.Tensor  # int64 [1, size]
    position_ids: torch.Tensor  # int64 [1 or 2, size]
    meta: AttentionMetadata
    recording: Recording


class DecodeGraphs:
    """Replays decode steps at the batch sizes given, each recorded when it is first met.

    A batch is padded to the next size by repeating its last sequence: the copies write what that one writes, where it
    writes, so nothing else has to be kept free for them. Logits of one step are overwritten by the next one.
    """

    def __init__(self, sizes: Sequence[int], record: Recorder) -> None:
        self.sizes = self._wanted = tuple(sorted(set(sizes)))
        self._record = record
        self._captured: dict[int, _Captured] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        """The sizes that were recorded so far."""
        return tuple(sorted(self._captured))

    def num_padding(self, num_decodes: int, num_seqs: int) -> int:
        """How many copies of its last sequence a batch needs to be replayed; 0 where it is not captured at all."""
        if num_decodes != num_seqs or not self.sizes or num_decodes > self.sizes[-1]:
            return 0
        return self.sizes[bisect_left(self.sizes, num_decodes)] - num_decodes

    def serves(self, batch: ForwardBatch) -> bool:
        """Whether this (padded) batch is one of decodes at a captured size."""
        return batch.ragged.num_decodes == batch.ragged.num_seqs and batch.ragged.num_seqs in self.sizes

    def run(
        self, batch: ForwardBatch, forward: Forward, attention: CapturablePlanner, kv_cache: PagedKVCache
    ) -> torch.Tensor:
        """The logits of a batch that `serves`, one row for each sequence, its copies included.

        Raises `BackendUnavailableError` if the step cannot be recorded.
        """
        size = batch.ragged.num_seqs
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(batch, forward, attention, kv_cache)
            return captured.recording.logits
        captured.input_ids.copy_(batch.input_ids, non_blocking=True)
        captured.position_ids.copy_(batch.position_ids, non_blocking=True)
        attention.replan(batch.ragged, captured.meta)
        captured.recording.replay()
        return captured.recording.logits

    def rebind(self, *, can_capture: bool) -> None:
        """Forget everything recorded: the backends or the cache are other ones now, which may not be capturable."""
        self._captured.clear()
        if self.sizes and not can_capture:
            _log.warning("decode steps are no longer captured: an attention backend has no plan that can be captured")
        self.sizes = self._wanted if can_capture else ()

    def _capture(
        self, batch: ForwardBatch, forward: Forward, attention: CapturablePlanner, kv_cache: PagedKVCache
    ) -> _Captured:
        """Record a step over copies of this batch, so that what it writes is right each time it is run."""
        size = batch.ragged.num_seqs
        try:
            input_ids, position_ids = batch.input_ids.clone(), batch.position_ids.clone()
            logits_indices = torch.arange(size, device=input_ids.device)
            meta = attention.plan_capture(size, kv_cache)
            attention.replan(batch.ragged, meta)
            recording = self._record(lambda: forward(input_ids, position_ids, meta, logits_indices))
            recording.replay()
        except InferenceShardformerError:
            raise
        except RuntimeError as exc:  # what a device refuses to capture
            raise BackendUnavailableError(
                f"a decode step of {size} sequences could not be captured: {exc}",
                remedy="set inference.graphs=none, and report this with the model and the versions of torch and of the "
                "attention backend",
            ) from exc
        return _Captured(input_ids, position_ids, meta, recording)


class CudaRecorder:
    """Records on a CUDA device. All recordings share one pool of memory, because one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None

    def __call__(self, step: Step) -> Recording:
        """Warm the step up on a stream of its own, where libraries allocate what they keep; then record it."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=cast("Any", self._pool), capture_error_mode="thread_local"):
                logits = step()
            self._pool = self._pool or graph.pool()
        return Recording(graph.replay, logits)


def decode_graphs(config: ResolvedConfig, device: torch.device) -> DecodeGraphs | None:
    """What the configuration decided; nothing where no step is captured."""
    return None if config.graphs == "none" else DecodeGraphs(graph_sizes(config.graphs), CudaRecorder(device))


def graph_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes up to `largest`: 1, 2, 4, 8, then every multiple of 16, and `largest` itself."""
    return tuple(sorted({largest, *(size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size <= largest)}))
