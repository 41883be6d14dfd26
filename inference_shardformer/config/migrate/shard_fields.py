"""ColossalAI's ShardConfig (colossalai/shardformer/shard/shard_config.py): each field and what becomes of it."""

from __future__ import annotations

from inference_shardformer.config.migrate.fates import (
    Fate,
    ForeignField,
    Given,
    dropped,
    part_of,
    refused,
    switch,
)

_GROUP = (
    "a process group is no configuration: pass it as InferenceShardformer(..., process_group=group); "
    "without it the ranks are those of the default group"
)
_NO_SEQUENCE_PARALLELISM = "had an effect only in sequence parallelism"
_FUSED = "chose kernels of the training policies, and ColossalAI's inference engine always switched it off"


def _convert_group(value: object, given: Given) -> Fate:
    """A group, which only code can hand over."""
    return Fate("dropped", "the default: the default group") if value is None else Fate("changed", _GROUP)


def _convert_tensor_parallelism(value: object, given: Given) -> Fate:
    """On leaves the size to the group, as there; off is one rank."""
    if not isinstance(value, bool):
        return Fate("refused", "must be true or false")
    settings = {} if value else {"shard.tp_size": 1}
    return Fate("renamed", "True leaves the size to the process group, as there", settings)


SHARD_FIELDS = (
    ForeignField(
        "tensor_parallel_process_group",
        None,
        "changed",
        "the argument `process_group=` of `InferenceShardformer`",
        _GROUP,
        _convert_group,
        needs_value=False,
    ),
    part_of("enable_sequence_parallelism", False, "sequence_parallel_process_group", None, _NO_SEQUENCE_PARALLELISM),
    refused("pipeline_stage_manager", None, "pipeline parallelism is not offered"),
    ForeignField(
        "enable_tensor_parallelism",
        True,
        "renamed",
        "`shard.tp_size: 1` where False",
        "True leaves the size to the process group, as there",
        _convert_tensor_parallelism,
    ),
    switch("enable_all_optimization", f"{_FUSED}; here the kernels are chosen by what can serve the model"),
    switch("enable_fused_normalization", _FUSED),
    switch(
        "enable_flash_attention",
        f"{_FUSED}; inference.attention.backend names a backend here",
        settings={"inference.attention.backend": "auto"},
    ),
    switch("enable_jit_fused", _FUSED),
    refused("enable_sequence_parallelism", False, "sequence parallelism is not offered"),
    part_of("enable_sequence_parallelism", False, "sequence_parallelism_mode", None, _NO_SEQUENCE_PARALLELISM),
    dropped(
        "parallel_output",
        True,
        "belongs to the training loss: tokens are always chosen from the logits of the whole vocabulary",
    ),
    dropped(
        "make_vocab_size_divisible_by",
        64,
        "nothing to choose: the plan pads the vocabulary as far as the ranks need and takes the padding off again",
    ),
    dropped("gradient_checkpoint_config", None, "belongs to training: inference keeps nothing for a backward pass"),
    refused("extra_kwargs", {}, "an untyped bag of which no key has a meaning here; a plug-in declares typed options"),
    part_of("enable_sequence_parallelism", False, "sp_axis", None, _NO_SEQUENCE_PARALLELISM),
    part_of("enable_sequence_parallelism", False, "pg_mesh", None, _NO_SEQUENCE_PARALLELISM),
    part_of("enable_sequence_parallelism", False, "inner_ring_size", None, _NO_SEQUENCE_PARALLELISM),
    refused("moe_dp_group", None, "mixtures of experts are not served"),
    refused("ep_group", None, "expert parallelism is not offered"),
    refused("fp8_communication", False, "ranks exchange the compute type; fp8 would change the results"),
)
"""In the order of its constructor, which also takes them by position."""

RETIRED_SHARD_FIELDS = (
    dropped("inference_only", False, "of ColossalAI 0.3.3 and 0.3.4: everything here is inference"),
    refused("inference_gptq", False, "of ColossalAI 0.3.3 and 0.3.4: GPTQ weights are not read"),
    dropped("enable_sequence_overlap", False, "of ColossalAI before 0.4.9: overlapped parts of training alone"),
)
"""Fields of older versions, accepted by name."""
