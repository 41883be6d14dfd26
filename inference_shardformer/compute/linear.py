"""The contract of linear kernels: they decide how a weight is stored, and multiply by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from inference_shardformer.compute.base import ComputeKernel, ComputeKind, ComputeSpec


@dataclass(frozen=True)
class LinearShape:
    """One weight on one rank, `[out_features, in_features]`.

    `is_gated`: the first half of the output features is the gate, the second what it gates. `is_table`: the weight is
    looked up by row as well (a tied embedding), and is never quantised.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    is_gated: bool = False
    is_table: bool = False


class LinearWeight(ABC):
    """One weight in the form its kernel reads; the one copy in memory.

    `tensors` holds what is stored by the name a module registers it under (`weight`, and scales where there are any);
    on the meta device until `allocate`, at the same addresses ever after.
    """

    shape: LinearShape
    tensors: Mapping[str, torch.Tensor]

    @abstractmethod
    def allocate(self, device: torch.device, *, is_zeroed: bool = False) -> None:
        """Give the tensors memory, once; every value that is not written then is zero with `is_zeroed`."""

    @abstractmethod
    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put `[rows, columns]` of the weight at a place, in its type. A quantised weight takes whole rows."""

    def settle(self) -> None:  # noqa: B027 - most have one form only
        """Everything is written for now: take the final form. It may be written again, and settled again."""

    def loading_ended(self) -> None:  # noqa: B027
        """Every weight of the model is settled: let go of what only loading needs."""

    def adopt(self, plain: torch.Tensor) -> None:
        """Take `[out_features, in_features]` over, once; the tensor itself may be kept."""
        self.allocate(plain.device)
        self.write(plain)
        self.settle()

    @abstractmethod
    def plain(self) -> torch.Tensor:
        """The weight as `[out_features, in_features]`: bit for bit what was stored, or its dequantised values."""

    @abstractmethod
    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x @ weight.T + bias + residual`; `[..., in_features]` to `[..., out_features]`."""

    def multiply_wide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `multiply`, in float32: logits."""
        return self.multiply(x, bias).float()

    @abstractmethod
    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`act(gate) * up` of the product, `[..., in_features]` to `[..., out_features / 2]`; see `fused_activations`.

        Only for a weight that is gated, by a kernel that fuses the model's activation.
        """

    @abstractmethod
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight by index, `[...]` to `[..., in_features]`; only for a table."""


class Compression(NamedTuple):
    """Whether weights are kept in fewer bits than their type has and read back bit for bit, and why, for people."""

    value: Literal["none", "lossless"]
    reason: str


class LinearKernel(ComputeKernel):
    """Makes the weights of all projections, of the output head, and of an embedding that is tied to it."""

    kind: ClassVar[ComputeKind] = ComputeKind.LINEAR
    fused_activations: ClassVar[frozenset[str]] = frozenset()  # Hugging Face's names

    @classmethod
    def compression(cls, spec: ComputeSpec) -> Compression:
        """How weights of the compute type will be kept; not at all compressed by default."""
        return Compression("none", f"linear kernel {cls.name} compresses no weights")

    @abstractmethod
    def weight(self, shape: LinearShape) -> LinearWeight:
        """An empty weight of this shape."""

    @abstractmethod
    def num_bytes(self, shape: LinearShape) -> int:
        """Bytes of everything that a weight of this shape stores."""
