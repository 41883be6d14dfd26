"""The conformance kit on this policy, with few key/value heads, with tied embeddings, and with biases."""

from functools import partial

from granite_policy import GranitePolicy
from tiny_granite import tiny_config

from inference_shardformer.conformance import policy_suite

TestGranite = policy_suite(
    GranitePolicy,
    {
        "few_kv_heads": tiny_config,
        "tied": partial(tiny_config, tie_word_embeddings=True, num_key_value_heads=8),
        "biased": partial(tiny_config, attention_bias=True, mlp_bias=True),
    },
)
