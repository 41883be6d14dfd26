"""ShardConfig: how the ranks are laid out, and the model cut over them. Values only, no group and no device object."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat

from inference_shardformer.config.frozen import FrozenMapping
from inference_shardformer.config.metadata import about
from inference_shardformer.config.values import Auto, Count, PluginOptions, Threads


class PolicyConfig(BaseModel):
    """How a policy cuts the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    options: PluginOptions = Field(
        default_factory=lambda: FrozenMapping(),  # type: ignore[arg-type]  # holds mappings alone
        description="Options that a policy declares for itself, under its name: `options.<policy>.<option>`.",
        json_schema_extra=about(),
    )


class ShardConfig(BaseModel):
    """How ranks are laid out, and the model cut over them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    tp_size: Count | Auto = Field(
        default="auto",
        description="Tensor-parallel ranks; auto: the process group's size.",
        json_schema_extra=about(unit="ranks", flag="--tp"),
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of every rank; auto: cuda where present.",
        json_schema_extra=about(flag="--device"),
    )
    threads_per_rank: Threads | Auto = Field(
        default="auto",
        description="CPU threads that torch uses in each rank; auto: torch's own number for the only rank of a host, "
        "else the cores of the host divided by its ranks.",
        json_schema_extra=about(unit="threads"),
    )
    timeout_s: StrictFloat = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="How long a rank may stay silent in one step before all ranks fail, by name.",
        json_schema_extra=about(unit="seconds"),
    )
    all_reduce: Literal["auto", "none", "shm", "symm_mem", "gloo", "nccl", "simulated"] = Field(
        default="auto",
        description="How partial sums are added over ranks; auto: through shared memory (shm), or small ones through "
        "symmetric memory of CUDA devices (symm_mem), where all ranks are on one host and can, else by the process "
        "group (gloo, nccl). gloo on CUDA devices lets ranks share a device, and is slow. none: the only rank; "
        "simulated: simulated ranks.",
        json_schema_extra=about(),
    )
    policy: PolicyConfig = PolicyConfig()
