"""SavesWeights: the calls that write the weights of a sharded model, from all ranks together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer import reversing
from inference_shardformer.ranks import Ranks
from inference_shardformer.resolving.preparation import Prepared
from inference_shardformer.sharded import Sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SavesWeights(ABC):
    """What an `InferenceShardformer` can do with its sharded model beside serving it."""

    def save_pretrained(self, model: PreTrainedModel, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Gather the weights into a checkpoint that Hugging Face loads: native names, no padding, ties kept.

        Tensors are written in the types they had, where the compute type holds their values. Rank 0 writes; no rank
        holds more than one whole tensor beside its part. Raises `CheckpointError`, the same on every rank.
        """
        prepared, sharded, ranks = self._held("save_pretrained()", model)
        ranks.guard.together(
            "saving", lambda: reversing.save_pretrained(prepared, sharded, ranks, Path(folder), max_shard_size)
        )

    def save_sharded(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Write every rank's own part, and the plan, without gathering.

        Only as many ranks with the same plan can load it, with `load_sharded`. Raises `CheckpointError`.
        """
        prepared, sharded, ranks = self._held("save_sharded()", model)
        ranks.guard.together("saving", lambda: reversing.save_sharded(prepared, sharded, ranks, Path(folder)))

    @abstractmethod
    def _held(self, call: str, model: PreTrainedModel | None = None) -> tuple[Prepared, Sharded, Ranks]:
        """What a sharded model hangs on. Raises `StateError` without one, and for another model than that."""
