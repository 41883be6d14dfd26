"""PlanReport: everything that a plan means for each rank, as an object for programs and as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from inference_shardformer.compute.linear import Compression
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.kv_cache.spec import KVCacheSpec
from inference_shardformer.planning.memory import Capacity, Workspace
from inference_shardformer.planning.rows import ParameterRow
from inference_shardformer.planning.text import report_text
from inference_shardformer.planning.traffic import UNITS, Traffic
from inference_shardformer.sharding.plan_document import PlanDocument
from inference_shardformer.sharding.plan_file import PlanFile

REPORT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PlanReport:
    """The plan of a model for `tp_size` ranks, its bytes, and what fits beside them.

    `compression` says how the linear kernel keeps weights; `rank_bytes` are the bytes of weights of each rank,
    `kv_cache` the shape of one rank's cache. `tp_sizes` maps every number of ranks up to the number of heads to why it
    is impossible, or `None`. `file` is what can be loaded from.
    """

    facts: ModelFacts
    policy: str
    tp_size: int
    dtype: str
    device: str
    compression: Compression
    rows: tuple[ParameterRow, ...]
    rank_bytes: tuple[int, ...]
    kv_cache: KVCacheSpec
    workspace: Workspace
    capacity: Capacity
    traffic: Traffic
    tp_sizes: Mapping[int, str | None]
    file: PlanFile

    @property
    def legal_tp_sizes(self) -> tuple[int, ...]:
        """The numbers of ranks that this model can be sharded over."""
        return tuple(size for size, problem in self.tp_sizes.items() if problem is None)

    def to_json(self) -> dict[str, object]:
        """A stable object for programs; every number is exact but those of the workspace."""
        document = self.file.document
        kv, traffic = self.kv_cache, self.traffic
        return {
            "schema_version": REPORT_SCHEMA_VERSION,
            "model": {**asdict(self.facts), "policy": self.policy},
            "fingerprint": document.fingerprint,
            "tp_size": self.tp_size,
            "dtype": self.dtype,
            "device": self.device,
            "compression": self.compression._asdict(),
            "tp_sizes": [{"tp_size": size, "problem": problem} for size, problem in self.tp_sizes.items()],
            "ranks": [
                {"rank": rank, "weight_bytes": num_bytes, "vocab_range": list(document.vocab_ranges[rank])}
                for rank, num_bytes in enumerate(self.rank_bytes)
            ],
            "kv_cache": {
                "num_kv_heads": kv.num_kv_heads,
                "head_dim": kv.head_dim,
                "block_size": kv.block_size,
                "bytes_per_token": kv.bytes_per_token,
                "bytes_per_block": kv.bytes_per_block,
            },
            "workspace": {**asdict(self.workspace), "num_bytes": self.workspace.num_bytes},
            "capacity": _capacity_object(self.capacity),
            "traffic": {
                "exchanges": [each._asdict() for each in traffic.exchanges],
                "undeclared": list(traffic.undeclared),
                "num_bytes": {unit.replace(" ", "_"): traffic.num_bytes(unit) for unit in UNITS},
            },
            "parameters": [_parameter_object(row, document) for row in self.rows],
        }

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, width: int = 120, *, is_complete: bool = False) -> str:
        """Aligned text within `width` columns; layers that are alike share a row unless it `is_complete`."""
        return report_text(self, width, is_complete=is_complete)


def _capacity_object(capacity: Capacity) -> dict[str, object]:
    return {
        "memory_bytes": capacity.memory.num_bytes,
        "memory_reason": capacity.memory.reason,
        "cache_bytes": capacity.cache_bytes,
        "num_blocks": capacity.num_blocks,
        "num_tokens": capacity.num_tokens,
        "max_context": capacity.max_context,
        "num_sequences": [
            {"num_tokens": length, "num_sequences": count} for length, count in capacity.num_sequences.items()
        ],
    }


def _parameter_object(row: ParameterRow, document: PlanDocument) -> dict[str, object]:
    """One parameter; a tied one has no slices of its own."""
    entry = document.parameters.get(row.name)
    return {
        "name": row.name,
        "style": row.style,
        "note": row.note,
        "num_bytes": list(row.num_bytes),
        "ranks": [] if entry is None else [part.model_dump(mode="json") for part in entry.ranks],
    }
