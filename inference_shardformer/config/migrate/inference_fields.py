"""ColossalAI's InferenceConfig (colossalai/inference/config.py): each of its fields and what becomes of it."""

from __future__ import annotations

from inference_shardformer.config.migrate.fates import ForeignField, carried, dropped, part_of, refused, switch
from inference_shardformer.config.migrate.sampling import (
    CACHE_DTYPE,
    DEFAULT_LENGTH,
    DO_SAMPLE,
    INPUT_LENGTH,
    OUTPUT_LENGTH,
    SAMPLING,
    TEMPLATE,
    convert_cache_dtype,
    convert_do_sample,
    convert_dtype,
    convert_max_input_len,
    convert_max_output_len,
    convert_template,
    if_sampling,
)

_TOP_K = "0 keeps every token, and null becomes 0; had an effect only with do_sample"
_TEMPERATURE = "had an effect only with do_sample, where only values above 0 up to 1 worked"
_TOP_P = "had an effect only with do_sample; null keeps every token"

INFERENCE_FIELDS = (
    carried(
        "max_batch_size",
        8,
        "inference.scheduler.max_num_seqs",
        "sequences in one step; the cache is sized for as many of them where it fits",
    ),
    ForeignField(
        "max_output_len",
        DEFAULT_LENGTH,
        "changed",
        f"`{SAMPLING}.max_new_tokens`, and its part of `inference.max_model_len`",
        OUTPUT_LENGTH,
        convert_max_output_len,
    ),
    ForeignField(
        "max_input_len",
        DEFAULT_LENGTH,
        "changed",
        "`inference.max_model_len`, the sum with max_output_len",
        INPUT_LENGTH,
        convert_max_input_len,
    ),
    ForeignField(
        "dtype",
        "fp16",
        "same",
        "`inference.dtype`",
        "torch types become their names; the default was fp16, ours is the checkpoint's type",
        convert_dtype,
    ),
    ForeignField(
        "kv_cache_dtype",
        None,
        "renamed",
        "`inference.cache.dtype`",
        CACHE_DTYPE,
        convert_cache_dtype,
    ),
    ForeignField(
        "prompt_template",
        None,
        "renamed",
        "`inference.prompt.template`",
        TEMPLATE,
        convert_template,
    ),
    ForeignField(
        "do_sample",
        False,
        "changed",
        f"`{SAMPLING}.temperature`; with True also `{SAMPLING}.top_k: 50` where top_k is not given",
        DO_SAMPLE,
        convert_do_sample,
    ),
    refused("beam_width", 1, "beam search is not offered; it raised NotImplementedError there (B29)"),
    dropped(
        "prefill_ratio",
        1.2,
        "nothing to choose: one step here holds parts of prompts and decoding side by side, where there "
        "a step was one or the other",
    ),
    refused("pad_input", False, "sequences are packed, never padded; True found no policy there"),
    dropped("early_stopping", False, "never had an effect: it ends beam searches, which did not work"),
    ForeignField("top_k", 50, "same", f"`{SAMPLING}.top_k`", _TOP_K, if_sampling("top_k", _TOP_K, off=0)),
    ForeignField("top_p", 1.0, "same", f"`{SAMPLING}.top_p`", _TOP_P, if_sampling("top_p", _TOP_P, off=1.0)),
    ForeignField(
        "temperature",
        1.0,
        "same",
        f"`{SAMPLING}.temperature`",
        _TEMPERATURE,
        if_sampling("temperature", _TEMPERATURE, off=1.0),
    ),
    carried(
        "no_repeat_ngram_size", 0, f"{SAMPLING}.no_repeat_ngram_size", "default of requests, no longer of the engine"
    ),
    carried(
        "repetition_penalty", 1.0, f"{SAMPLING}.repetition_penalty", "default of requests, no longer of the engine"
    ),
    refused(
        "forced_eos_token_id",
        None,
        "never worked: it did not reach the sampler, whose code for it fails (B29); use stop_token_ids of a request",
    ),
    carried("ignore_eos", False, f"{SAMPLING}.ignore_eos", "default of requests, no longer of the engine"),
    refused(
        "use_spec_dec",
        False,
        "speculative decoding with a second model is not offered; "
        "scheduler.speculation=prompt_lookup guesses without one",
    ),
    part_of("use_spec_dec", False, "max_n_spec_tokens", 5, "had an effect only in speculative decoding"),
    part_of("use_spec_dec", False, "glimpse_large_kv", False, "never had an effect: nothing read it"),
    carried("block_size", 16, "inference.cache.block_size", "tokens in one block of the cache"),
    carried("tp_size", 1, "shard.tp_size", "tensor-parallel ranks; ours are those of the process group unless given"),
    refused("pp_size", 1, "pipeline parallelism is not offered; there it only shaped the mesh of ranks"),
    part_of("pp_size", 1, "micro_batch_size", 1, "never had an effect: nothing read it"),
    part_of("pp_size", 1, "micro_batch_buffer_size", None, "never had an effect: nothing read it"),
    switch(
        "use_cuda_kernel",
        "chose CUDA kernels and their cache layout over Triton's; here the attention backend is chosen by what can "
        "serve the model, and inference.attention.backend names one",
        settings={"inference.attention.backend": "auto"},
    ),
    switch("high_precision", "there is nothing to choose: norms and attention accumulate in fp32 for fp16 and bf16"),
    switch(
        "use_cuda_graph", "there is no such setting; results are the same, and decoding runs without captured graphs"
    ),
    dropped("max_context_len_to_capture", 512, "never had an effect: max_input_len + max_output_len replaced it"),
    refused(
        "enable_streamingllm", False, "attention sinks are not offered; a sequence ends at inference.max_model_len"
    ),
    dropped("start_token_size", 4, "never had an effect: block_size replaced it"),
    part_of("enable_streamingllm", False, "generated_token_size", 512, "had an effect only in StreamingLLM"),
    refused("patched_parallelism_size", 1, "belongs to diffusion models, which are not served here"),
)
"""In the order of its constructor, which also takes them by position."""

DIFFERENT_DEFAULTS = {
    "max_batch_size": "8 sequences in one step",
    "max_output_len": "256 tokens",
    "dtype": "fp16",
}
"""Fields whose default was another than ours; told where a configuration leaves them out."""
