"""The kit for policies on policies of ours."""

from __future__ import annotations

from functools import partial

from tiny_models import tiny_config

from inference_shardformer.conformance import policy_suite
from inference_shardformer.policies.llama import LlamaPolicy


class Declared(LlamaPolicy):
    """As a plug-in would state it."""

    contract_version = 1


TestLlama = policy_suite(Declared, {case: partial(tiny_config, case) for case in ("gqa", "odd_vocabulary_tied")})
