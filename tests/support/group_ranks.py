"""Ranks of a collectives test: every collective against what the ranks are known to hold; prints what differs."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist

from inference_shardformer.distributed.environment import ensure_process_group, process_group_for
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import EnvironmentMismatchError, StateError

CPU = torch.device("cpu")


def held_by(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings: any rank can compute it, and small whole numbers add up exactly in every type."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def check_group(group: TensorParallelGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((5,), (3, 4), (2, 3, 4)):
            everyone = [held_by(rank, shape, dtype) for rank in range(group.size)]
            mine = everyone[group.rank].clone()
            for dim in (-1, 0):
                assert torch.equal(group.all_gather(mine, dim=dim), torch.cat(everyone, dim=dim))
            assert torch.equal(
                group.all_gather(mine.transpose(0, -1)), torch.cat([t.transpose(0, -1) for t in everyone], -1)
            )
            for src in range(group.size):
                copy = mine.clone()
                assert group.broadcast(copy, src=src) is copy
                assert torch.equal(copy, everyone[src])
            assert group.all_reduce(mine) is mine
            assert torch.equal(mine, torch.stack(everyone).sum(0).to(dtype))
    for length in (0, 1, 1016, 1017, 5000):
        for src in range(group.size):
            payload = bytes(range(256)) * 20
            sent = payload[:length] if group.rank == src else None
            assert group.broadcast_bytes(sent, src=src) == payload[:length]
    said = [b"x" * (600 * rank) for rank in range(group.size)]
    assert group.all_gather_bytes(said[group.rank]) == said
    before = group.num_collectives
    group.broadcast_bytes(b"small")
    group.barrier()
    assert group.num_collectives == before + 2


def check_two_alternately(rank: int) -> None:
    """Two groups over the same ranks do not mix up their messages, and one outlives the other."""
    first, second = (
        TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20) for _ in range(2)
    )
    for step in range(20):
        for group, factor in ((first, 1), (second, 100)):
            t = torch.tensor([float(factor * (step + rank))])
            assert group.all_reduce(t).item() == factor * sum(step + other for other in range(group.size))
    first.close()
    first.close()
    for refused in (first.barrier, lambda: first.all_reduce(torch.ones(1))):
        with pytest.raises(StateError, match="closed"):
            refused()
    check_group(second)
    second.close()


def check_mismatch() -> str:
    assert process_group_for(dist.get_world_size()) is dist.group.WORLD
    assert process_group_for(None) is dist.group.WORLD
    with pytest.raises(EnvironmentMismatchError) as caught:
        process_group_for(2)
    return caught.value.message


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    assert ensure_process_group(CPU, 60)
    assert not ensure_process_group(CPU, 60)
    check_group(TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20))
    check_two_alternately(rank)
    message = check_mismatch()
    mine = None
    for ranks in ([3, 1], [0, 2]):
        sub_group = dist.new_group(ranks)
        if rank in ranks:
            mine = sub_group
    group = TensorParallelGroup.from_process_group(mine, device=CPU, timeout_s=20)
    check_group(group)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor = TensorParallelGroup.from_process_group(mesh.get_group("tensor"), device=CPU, timeout_s=20)
    check_group(tensor)
    world = torch.ones(1)
    dist.all_reduce(world)
    dist.destroy_process_group()
    ranks = {"sub": [group.rank, group.size], "mesh": [tensor.rank, tensor.size]}
    print(json.dumps({"message": message, "world": world.item(), **ranks}))


if __name__ == "__main__":
    main()
