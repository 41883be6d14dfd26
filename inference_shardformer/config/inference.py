"""InferenceConfig: how to infer. Values only; everything "auto" is replaced while resolving."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from inference_shardformer.config.values import Auto, Bytes, Count, Share

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=False)


class AttentionConfig(BaseModel):
    """Which attention backend serves the model."""

    model_config = _FROZEN

    backend: str = Field(
        default="auto", min_length=1, description="Backend name; auto: the first without a reason against it."
    )


class CacheConfig(BaseModel):
    """The paged KV cache."""

    model_config = _FROZEN

    block_size: StrictInt = Field(default=16, ge=1, le=1024, description="Tokens per block.")
    num_blocks: Count | Auto = Field(default="auto", description="Blocks; auto: sized from memory_limit.")
    memory_limit: Bytes | Share | Auto = Field(
        default="auto",
        description="Bytes for keys and values on each rank (an integer above 1), or a fraction of the memory free "
        "after loading (at most 1.0); auto: what max_num_seqs sequences of max_model_len need, within half of free "
        "memory.",
    )


class SchedulerConfig(BaseModel):
    """What one step may hold."""

    model_config = _FROZEN

    max_num_seqs: StrictInt = Field(
        default=64, ge=1, le=65536, description="Sequences in one step.", json_schema_extra={"mutability": "live"}
    )
    max_num_batched_tokens: StrictInt = Field(
        default=2048,
        ge=1,
        description="Tokens in one step; longer prompts are cut into chunks.",
        json_schema_extra={"mutability": "live"},
    )


class SamplingDefaults(BaseModel):
    """Sampling of a request that says nothing else."""

    model_config = _FROZEN

    max_new_tokens: StrictInt = Field(
        default=64, ge=1, description="Tokens to generate at most.", json_schema_extra={"mutability": "per_request"}
    )
    temperature: StrictFloat = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        allow_inf_nan=False,
        description="0 is greedy.",
        json_schema_extra={"mutability": "per_request"},
    )
    top_k: StrictInt = Field(
        default=0,
        ge=0,
        description="Keep the k likeliest tokens; 0 keeps all.",
        json_schema_extra={"mutability": "per_request"},
    )
    top_p: StrictFloat = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Keep the smallest set of this probability.",
        json_schema_extra={"mutability": "per_request"},
    )


class WeightsConfig(BaseModel):
    """How weights are read."""

    model_config = _FROZEN

    trust_remote_code: StrictBool = Field(default=False, description="Run model code that comes with a checkpoint.")


class InferenceConfig(BaseModel):
    """How to infer."""

    model_config = _FROZEN

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Compute type; auto: the checkpoint's."
    )
    max_model_len: Count | Auto = Field(default="auto", description="Longest sequence; auto: the model's context.")
    seed: StrictInt = Field(default=0, ge=0, lt=2**63, description="Seed of requests that bring none.")
    attention: AttentionConfig = AttentionConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingDefaults = SamplingDefaults()
    weights: WeightsConfig = WeightsConfig()
