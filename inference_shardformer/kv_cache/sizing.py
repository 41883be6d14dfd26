"""How many blocks the paged cache gets, and why."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from inference_shardformer.config.inference import CacheConfig
from inference_shardformer.errors import CapacityError
from inference_shardformer.kv_cache.spec import KVCacheSpec

_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20


class CacheSize(NamedTuple):
    """The number of blocks on this rank, and the sentence that explains it."""

    num_blocks: int
    reason: str


def size_cache(
    spec: KVCacheSpec,
    cache_config: CacheConfig,
    max_num_seqs: int,
    max_model_len: int,
    free_bytes: int,
    ranks_on_host: int = 1,
) -> CacheSize:
    """Turn `cache_config` into a number of blocks; ranks then agree on the smallest.

    `free_bytes` is shared by `ranks_on_host` ranks: those on the same CPU memory, or 1 where a rank has its own device.
    Raises `CapacityError` if not even one block fits.
    """
    share = free_bytes // ranks_on_host
    limit = cache_config.memory_limit
    if cache_config.num_blocks != "auto":
        size = CacheSize(cache_config.num_blocks, f"cache.num_blocks={cache_config.num_blocks} was given")
    elif limit == "auto":
        size = _automatic(spec, max_num_seqs, max_model_len, share)
    elif isinstance(limit, float):
        size = CacheSize(
            int(limit * share) // spec.bytes_per_block,
            f"{limit:.0%} of the {share // _MIB} MiB free for this rank, in blocks of {spec.bytes_per_block} bytes",
        )
    else:
        size = CacheSize(
            limit // spec.bytes_per_block, f"{limit} bytes given, in blocks of {spec.bytes_per_block} bytes"
        )
    _refuse_impossible(spec, size, share)
    return size


def free_memory(device: torch.device) -> int:
    """Bytes free for this process: of the device, or of the host within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    headroom = control_group_headroom(_CGROUP)
    return available if headroom is None else min(available, headroom)


def control_group_headroom(folder: Path) -> int | None:
    """Bytes until the memory limit of the control group at `folder` (cgroup v2); None without a limit.

    File pages that the system would drop first do not count as used: a checkpoint just read is not in the way.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(counters.get("inactive_file", 0)))


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // block_size)


def _automatic(spec: KVCacheSpec, max_num_seqs: int, max_model_len: int, share: int) -> CacheSize:
    wanted = max_num_seqs * blocks_for(max_model_len, spec.block_size)
    affordable = share // 2 // spec.bytes_per_block
    if wanted <= affordable:
        return CacheSize(wanted, f"enough for max_num_seqs={max_num_seqs} sequences of max_model_len={max_model_len}")
    return CacheSize(
        affordable,
        f"half of the {share // _MIB} MiB free for this rank; max_num_seqs={max_num_seqs} sequences of "
        f"max_model_len={max_model_len} would take {wanted} blocks",
    )


def _refuse_impossible(spec: KVCacheSpec, size: CacheSize, share: int) -> None:
    if size.num_blocks < 1:
        raise CapacityError(
            f"the cache would hold no block ({size.reason}); one block of {spec.block_size} tokens takes "
            f"{spec.bytes_per_block} bytes and {share} are free for this rank",
            remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
        )
    num_bytes = size.num_blocks * spec.bytes_per_block
    if num_bytes > share:
        raise CapacityError(
            f"{size.num_blocks} blocks take {num_bytes} bytes ({size.reason}); {share} are free for this rank",
            remedy=f"at most {share // spec.bytes_per_block} blocks fit: lower cache.num_blocks or cache.memory_limit",
        )
