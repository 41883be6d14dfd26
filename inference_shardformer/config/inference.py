"""InferenceConfig: how to infer. Values only; everything "auto" is replaced while resolving."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator

from inference_shardformer.config.frozen import FrozenMapping
from inference_shardformer.config.metadata import about
from inference_shardformer.config.templates import TEMPLATE_PATTERN, template_text
from inference_shardformer.config.values import Auto, BlockLength, Bytes, Count, PluginOptions, Share

TUNED = "tuned"  # the attention backend that a profile chooses
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=False)


class AttentionConfig(BaseModel):
    """Which attention backend serves the model."""

    model_config = _FROZEN

    backend: str = Field(
        default="auto",
        min_length=1,
        description="Backend name; auto: the first without a reason against it; tuned: the choice in profile.",
        json_schema_extra=about(flag="--attention-backend"),
    )
    profile: str | None = Field(
        default=None,
        min_length=1,
        description="File that `bench backends --save` wrote, where backend is tuned.",
        json_schema_extra=about(),
    )
    options: PluginOptions = Field(
        default_factory=lambda: FrozenMapping(),  # type: ignore[arg-type]  # holds mappings alone
        description="Options that a backend declares for itself, under its name: `options.<backend>.<option>`.",
        json_schema_extra=about(),
    )


class KernelsConfig(BaseModel):
    """Which kernels compute what stands around attention."""

    model_config = _FROZEN

    linear: str = Field(
        default="auto",
        min_length=1,
        description="Kernel of all projections and of the output head; auto: the first without a reason against it.",
        json_schema_extra=about(),
    )
    norm: str = Field(
        default="auto",
        min_length=1,
        description="Kernel of the root-mean-square norms; auto: the first without a reason against it.",
        json_schema_extra=about(),
    )
    rotary_write: str = Field(
        default="auto",
        min_length=1,
        description="What gives queries and keys their positions and stores keys and values; auto: one fused kernel "
        "where it can, else torch and the attention backend's own write.",
        json_schema_extra=about(),
    )
    activation: str = Field(
        default="auto",
        min_length=1,
        description="What applies a gated MLP's activation; auto: fused into the linear kernel where that can.",
        json_schema_extra=about(),
    )
    experts: str = Field(
        default="auto",
        min_length=1,
        description="What runs a mixture of experts; auto: one kernel for all of them where it can, else one by one.",
        json_schema_extra=about(),
    )
    decoder_layer: str = Field(
        default="auto",
        min_length=1,
        description="What runs a decoder layer; auto: one fused kernel where it can, else its modules one by one.",
        json_schema_extra=about(),
    )
    sampling: str = Field(
        default="auto",
        min_length=1,
        description="What finds the likeliest tokens and draws others; auto: the first without a reason against it.",
        json_schema_extra=about(),
    )


class CacheConfig(BaseModel):
    """The paged KV cache."""

    model_config = _FROZEN

    dtype: Literal["fp8"] | None = Field(
        default=None,
        description="fp8: keys and values are kept in e4m3 as they are, without scales, by an attention backend that "
        "takes them so. Nothing: in the compute type.",
        json_schema_extra=about(),
    )
    block_size: BlockLength | Auto = Field(
        default="auto",
        description="Tokens per block; auto: 16, or the least that the first attention backend that can serve takes.",
        json_schema_extra=about(unit="tokens"),
    )
    num_blocks: Count | Auto = Field(
        default="auto",
        description="Blocks on each rank; auto: sized from memory_limit.",
        json_schema_extra=about(unit="blocks"),
    )
    memory_limit: Bytes | Share | Auto = Field(
        default="auto",
        description="Bytes for keys and values on each rank (an integer above 1), or a fraction of the memory free "
        "after loading (at most 1.0); auto: what max_num_seqs sequences of max_model_len need, within half of free "
        "memory.",
        json_schema_extra=about(unit="bytes, or a fraction"),
    )
    prefix_caching: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Requests that begin with the same tokens share blocks, also with finished ones as long as nothing "
        "else needs these; auto: on, unless the model's rotary frequencies depend on the length of the prompt.",
        json_schema_extra=about(),
    )


class SchedulerConfig(BaseModel):
    """What one step may hold."""

    model_config = _FROZEN

    max_num_seqs: StrictInt = Field(
        default=64,
        ge=1,
        le=65536,
        description="Sequences in one step.",
        json_schema_extra=about(mutability="live", unit="sequences", flag="--max-num-seqs"),
    )
    max_num_batched_tokens: StrictInt = Field(
        default=2048,
        ge=1,
        description="Tokens in one step; longer prompts are cut into chunks.",
        json_schema_extra=about(mutability="live", unit="tokens"),
    )
    overlap: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Prepare the next step, and make the text of the last one, while the device computes; chunks of a "
        "stream then come a step later, tokens are the same. auto: on where the device is not the CPU.",
        json_schema_extra=about(),
    )
    speculation: Literal["off", "prompt_lookup"] = Field(
        default="off",
        description="Guess the next tokens of a sequence from what followed the same tokens earlier in it, and verify "
        "the guesses in one step: texts that repeat themselves, such as code that is edited, need fewer steps. Tokens "
        "are chosen as without. While it is on, no step is prepared ahead (scheduler.overlap).",
        json_schema_extra=about(mutability="live"),
    )
    max_draft_tokens: StrictInt = Field(
        default=8,
        ge=1,
        le=64,
        description="Guesses that are verified in one step for each sequence, at most.",
        json_schema_extra=about(mutability="live", unit="tokens"),
    )


class SamplingDefaults(BaseModel):
    """Sampling of a request that says nothing else."""

    model_config = _FROZEN

    max_new_tokens: StrictInt = Field(
        default=64,
        ge=1,
        description="Tokens to generate at most.",
        json_schema_extra=about(mutability="per_request", unit="tokens", flag="--max-new-tokens"),
    )
    temperature: StrictFloat = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        allow_inf_nan=False,
        description="0 is greedy.",
        json_schema_extra=about(mutability="per_request", flag="--temperature"),
    )
    top_k: StrictInt = Field(
        default=0,
        ge=0,
        description="Keep the k likeliest tokens; 0 keeps all.",
        json_schema_extra=about(mutability="per_request", unit="tokens", flag="--top-k"),
    )
    top_p: StrictFloat = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Keep the smallest set of this probability.",
        json_schema_extra=about(mutability="per_request", unit="probability", flag="--top-p"),
    )
    repetition_penalty: StrictFloat = Field(
        default=1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Above 1, tokens of the prompt and the output so far become less likely; 1 changes nothing.",
        json_schema_extra=about(mutability="per_request"),
    )
    no_repeat_ngram_size: StrictInt = Field(
        default=0,
        ge=0,
        description="No sequence of this many tokens occurs twice; 0 allows all.",
        json_schema_extra=about(mutability="per_request", unit="tokens"),
    )
    ignore_eos: StrictBool = Field(
        default=False,
        description="Go on after an end-of-sequence token.",
        json_schema_extra=about(mutability="per_request"),
    )


class PromptConfig(BaseModel):
    """What becomes of a text prompt before it is tokenised."""

    model_config = _FROZEN

    template: str | None = Field(
        default=None,
        description="Text around a text prompt, with {input_text} where it goes, or one of the names llama, vicuna, "
        "baichuan; nothing: prompts as they are. Token ids are never changed.",
        json_schema_extra={**about(), "pattern": TEMPLATE_PATTERN},
    )

    @field_validator("template")
    @classmethod
    def _takes_a_prompt(cls, template: str | None) -> str | None:
        if template is not None:
            template_text(template)
        return template


class WeightsConfig(BaseModel):
    """How weights are read."""

    model_config = _FROZEN

    trust_remote_code: StrictBool = Field(
        default=False,
        description="Permit model code that comes with a checkpoint to run.",
        json_schema_extra=about(),
    )
    allow_pickle: StrictBool = Field(
        default=False,
        description="Permit weights in pickled files (pytorch_model*.bin) where there are no safetensors ones.",
        json_schema_extra=about(),
    )
    quantization: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="int8 (native CPU kernels) or fp8 (CUDA from compute capability 8.9): projections and output head "
        "are kept in 8 bits, rounded while they are read; embeddings and norms stay as they are. Nothing: weights as "
        "they are.",
        json_schema_extra=about(flag="--quantization"),
    )
    compression: Literal["auto", "none", "lossless"] = Field(
        default="auto",
        description="lossless: bf16 weights of the native CPU kernels are kept in 12 bits instead of 16 and read back "
        "bit for bit; auto: where the kernels gain by it, else none; none: never.",
        json_schema_extra=about(),
    )


class InferenceConfig(BaseModel):
    """How to infer."""

    model_config = _FROZEN

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Compute type; auto: the checkpoint's.", json_schema_extra=about(flag="--dtype")
    )
    max_model_len: Count | Auto = Field(
        default="auto",
        description="Longest sequence, prompt and output together; auto: the model's context.",
        json_schema_extra=about(unit="tokens"),
    )
    seed: StrictInt = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of requests that bring none.",
        json_schema_extra=about(flag="--seed"),
    )
    strict: StrictBool = Field(
        default=True,
        description="Refuse a value that is accepted but cannot take effect; false: record it as an event.",
        json_schema_extra=about(),
    )
    graphs: Count | Literal["auto", "none"] = Field(
        default="auto",
        description="Capture decode steps of up to so many sequences on a CUDA device, and replay them; auto: where "
        "backend and model can, up to 256; none: never.",
        json_schema_extra=about(unit="sequences"),
    )
    attention: AttentionConfig = AttentionConfig()
    kernels: KernelsConfig = KernelsConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingDefaults = SamplingDefaults()
    prompt: PromptConfig = PromptConfig()
    weights: WeightsConfig = WeightsConfig()
