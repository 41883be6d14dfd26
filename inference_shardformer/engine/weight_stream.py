"""WeightStream: whole tensors, one after another, that all ranks agree on and each stores its own part of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from inference_shardformer.engine.events import ByteGroup


class WeightWriter(Protocol):
    """Writes whole tensors of the unsharded model into the parameters of this rank."""

    def canonical(self, name: str) -> str:
        """The name under which a tensor is stored: that of its owner, if it is tied to one."""

    def problem(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a tensor is none of this model's, or `None`."""

    def holds(self, name: str, whole: torch.Tensor) -> bool:
        """Whether the parts of this rank have these values already."""

    def store(self, name: str, whole: torch.Tensor) -> None:
        """Write this rank's parts of one tensor, in place."""


class WeightGroup(ByteGroup, Protocol):
    """The collectives of an update."""

    device: torch.device

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Overwrite `t` with that of rank `src`, in place."""


class WeightRefusal(Exception):
    """What is wrong with the next item, and on which rank; the same on every rank."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(f"rank {rank}: {problem}" if rank >= 0 else problem)
        self.rank = max(rank, 0)
        self.problem = problem


class _Told(NamedTuple):
    """What a rank says of its next item: its name, shape and type as text, nothing at the end; or what is wrong."""

    item: str
    problem: str = ""


class WeightStream:
    """One update. Every rank brings the same weights; or rank 0 alone does, and sends each tensor to the others.

    Before each item the ranks tell each other what they have, and whether storing the last one went well.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        writer: WeightWriter,
        group: WeightGroup,
    ) -> None:
        self._items = iter(weights.items() if isinstance(weights, Mapping) else weights)
        self._kind = "iterator" if not isinstance(weights, Mapping) else "mapping" if weights else "nothing"
        self._writer = writer
        self._group = group
        self._is_sent: bool | None = None  # not known before the first step
        self._stored: set[str] = set()
        self._failure = ""
        self._cause: Exception | None = None

    @property
    def num_stored(self) -> int:
        """Tensors that were stored, or begun to be; tied ones once."""
        return len(self._stored)

    def step(self) -> bool:
        """Agree on one item and store it; False at the end. Raises `WeightRefusal` on every rank alike."""
        if self._is_sent is None:
            self._is_sent = self._agree_on_source()
        told, tensor = self._next()
        answers = self._tell(told)
        speaking = answers[:1] if self._is_sent else answers
        for rank, answer in enumerate(answers):
            if answer.problem:
                raise WeightRefusal(rank, answer.problem) from (self._cause if rank == self._group.rank else None)
        if len({answer.item for answer in speaking}) > 1:
            brought = "; ".join(answer.item or "nothing more" for answer in speaking)
            raise WeightRefusal(-1, f"the ranks brought different items: {brought}")
        if not speaking[0].item:
            return False
        name, shape, dtype = json.loads(speaking[0].item)
        if self._is_sent:
            tensor = self._received(tensor, shape, getattr(torch, dtype))
        if tensor is not None:
            self._store(name, tensor)
        return True

    def _agree_on_source(self) -> bool:
        """Whether rank 0 sends; what else the ranks bring must be alike."""
        kinds = [answer.item for answer in self._tell(_Told(self._kind))]
        if len(kinds) > 1 and kinds[0] != "nothing" and set(kinds[1:]) == {"nothing"}:
            return True
        if len(set(kinds)) > 1:
            raise WeightRefusal(
                -1, f"the ranks brought {', '.join(kinds)}; bring the same on all, or weights on rank 0 alone"
            )
        return False

    def _next(self) -> tuple[_Told, torch.Tensor | None]:
        """What this rank has next, or what went wrong on it."""
        if self._failure or (self._is_sent and self._group.rank > 0):
            return _Told("", self._failure), None
        try:
            item = next(self._items, None)
        except Exception as exc:  # noqa: BLE001 - the caller's iterator may raise anything, and all ranks must know
            self._cause = exc
            return _Told("", f"the iterator raised {type(exc).__name__}: {exc}"), None
        if item is None:
            return _Told(""), None
        name, tensor = item
        problem = check(name, tensor, self._writer)
        if not problem and self._writer.canonical(name) in self._stored and not self._writer.holds(name, tensor):
            problem = f"{name} was given before, by this name or by one that is tied to it, with other values"
        if problem:
            return _Told("", problem), None
        return _Told(json.dumps([name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])), tensor

    def _received(self, tensor: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Rank 0's tensor, on every rank."""
        if tensor is None:
            whole = torch.empty(shape, dtype=dtype, device=self._group.device)
        else:
            whole = tensor.detach().to(self._group.device).contiguous()
        if whole.numel():
            self._group.broadcast(whole.view(-1).view(torch.uint8), src=0)
        return whole

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        self._stored.add(self._writer.canonical(name))
        try:
            self._writer.store(name, tensor)
        except Exception as exc:  # noqa: BLE001 - told to all ranks before the next item, and raised on all of them
            self._failure, self._cause = f"{name} could not be stored: {type(exc).__name__}: {exc}", exc

    def _tell(self, told: _Told) -> list[_Told]:
        """What every rank says."""
        if self._group.size == 1:
            return [told]
        return [_Told(*json.loads(each)) for each in self._group.all_gather_bytes(json.dumps(told).encode("ascii"))]


def check(name: str, tensor: object, writer: WeightWriter) -> str:
    """What is wrong with one item by itself; empty if nothing is."""
    if not isinstance(tensor, torch.Tensor):
        return f"{name} is a {type(tensor).__name__}, not a tensor"
    if tensor.is_meta:
        return f"{name} is on the meta device and has no values"
    return writer.problem(name, tuple(tensor.shape), tensor.dtype) or ""
