"""InferenceEngine with ColossalAI's signature and results, over our engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from torch import nn

from inference_shardformer.bridges.colossalai.config import InferenceConfig
from inference_shardformer.bridges.colossalai.requests import Batch, max_new_tokens, read_batch, sampling_of
from inference_shardformer.config.templates import filled
from inference_shardformer.engine.sampling_params import SamplingParams
from inference_shardformer.errors import ConfigError, PolicyError, RequestError, UnsupportedModelError
from inference_shardformer.policies.base import Policy
from inference_shardformer.shardformer import InferenceShardformer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from inference_shardformer.engine.outputs import RequestOutput

_LOGGER = logging.getLogger(__name__)

Results = list[str] | tuple[list[str], list[list[int]]]


class InferenceEngine:
    """ColossalAI's `InferenceEngine`: what `generate` takes and returns is as there, what it does is ours.

    Texts hold prompt and completion. `engine` is our engine, `shardformer` what made it, for everything else that they
    can do. A model is sharded in place; of a path every rank reads its own part, and code that comes with a checkpoint
    is not run. The tokenizer is not changed. Raises what `InferenceShardformer` raises, before any weight is read.
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inference_config: InferenceConfig | None = None,
        verbose: bool = False,
        model_policy: object = None,
    ) -> None:
        config = inference_config if inference_config is not None else InferenceConfig()
        if not isinstance(config, InferenceConfig):
            raise ConfigError(
                f"inference_config is a {type(config).__module__}.{type(config).__qualname__}",
                remedy="use InferenceConfig of inference_shardformer.bridges.colossalai; it takes the same fields",
            )
        _check_model(model_or_path)
        policy = model_policy() if isinstance(model_policy, type) else model_policy
        self.inference_config = config
        self.tokenizer = tokenizer
        self.shardformer = _shardformer(config, policy)
        self._queued: dict[str, int] = {}
        self._next_id = 0
        try:
            if isinstance(model_or_path, nn.Module):
                model, _ = self.shardformer.optimize(
                    cast("PreTrainedModel", model_or_path), cast("Policy | None", policy)
                )
            else:
                model = self.shardformer.from_pretrained(model_or_path, policy=cast("Policy | None", policy))
            self.engine = self.shardformer.attach(model, tokenizer=tokenizer)
        except BaseException:
            self.shardformer.close()
            raise
        if verbose:
            _LOGGER.info("%s", self.shardformer.explain())

    def generate(
        self,
        request_ids: list[int] | int | list[str] | str | None = None,
        prompts: list[str] | str | None = None,
        prompts_token_ids: object = None,
        return_token_ids: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> Results:
        """Generate for these prompts and everything that was added before; texts, and with `return_token_ids` ids too.

        Results are in the order of the request ids. `generate(prompts)` works as it reads. Raises `RequestError`, with
        nothing queued, if any prompt cannot be served, or if there is nothing to do.
        """
        batch = read_batch(request_ids, prompts, prompts_token_ids)
        if batch is None and not self._queued:
            raise RequestError(
                "generate() was given no prompts", remedy="give prompts=[...] or prompts_token_ids=[...]"
            )
        finished: dict[int, RequestOutput] = {}
        if batch is not None:
            ids = self._ids_for(batch)
            outputs = self.engine.generate(batch.prompts, self._sampling(batch, generation_config))
            finished.update(zip(ids, outputs, strict=True))
        while self._queued:
            finished.update((self._queued.pop(output.request_id), output) for output in self.engine.step())
        ordered = [finished[number] for number in sorted(finished)]
        texts = [self._text(output) for output in ordered]
        return (texts, [list(output.token_ids) for output in ordered]) if return_token_ids else texts

    def add_request(
        self,
        request_ids: list[int] | int | list[str] | str | None = None,
        prompts: list[str] | str | None = None,
        prompts_token_ids: object = None,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """Queue requests for `step` or the next `generate`. All are checked before the first is queued (B9)."""
        batch = read_batch(request_ids, prompts, prompts_token_ids)
        if batch is None:
            raise RequestError("add_request() was given no prompts", remedy="give prompts=[...]")
        sampling = [_limited(self._length(prompt), max_new_tokens, max_length) for prompt in batch.prompts]
        ids = self._ids_for(batch)
        added: list[str] = []
        try:
            for prompt, params in zip(batch.prompts, sampling, strict=True):
                added.append(self.engine.add_request(prompt, params))
        except BaseException:
            for name in added:
                self.engine.abort(name)
            raise
        self._queued.update(zip(added, ids, strict=True))

    def step(self) -> list[RequestOutput]:
        """One step; the added requests that have finished."""
        outputs = self.engine.step()
        for output in outputs:
            self._queued.pop(output.request_id, None)
        return outputs

    def enable_spec_dec(self, *arguments: object, **options: object) -> NoReturn:
        """Refused by name: no second model drafts tokens, and greedy tokens are the same without one."""
        raise ConfigError(
            "enable_spec_dec(): speculative decoding with a second model is not offered",
            remedy="leave the call out, greedy tokens are equal; scheduler.speculation=prompt_lookup guesses without "
            "one",
        )

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.shardformer.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _sampling(self, batch: Batch, config: GenerationConfig | None) -> list[SamplingParams]:
        return [sampling_of(config, self._length(prompt) if config is not None else 0) for prompt in batch.prompts]

    def _length(self, prompt: str | list[int]) -> int:
        """The tokens of a prompt, with the template around it."""
        if not isinstance(prompt, str):
            return len(prompt)
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer", remedy="give tokenizer=, or prompts_token_ids=")
        template = self.inference_config.inference.prompt.template
        return len(self.tokenizer.encode(prompt if template is None else filled(template, prompt)))

    def _ids_for(self, batch: Batch) -> list[int]:
        """The given ids, or the next ones."""
        taken = set(self._queued.values())
        if batch.ids is not None and taken & set(batch.ids):
            raise RequestError(f"request ids {sorted(taken & set(batch.ids))} are queued already", remedy="give others")
        ids = batch.ids if batch.ids is not None else list(range(self._next_id, self._next_id + len(batch.prompts)))
        self._next_id = max([self._next_id, *(number + 1 for number in ids)])
        return ids

    def _text(self, output: RequestOutput) -> str:
        """Prompt and completion, decoded together, as ColossalAI returns them."""
        if self.tokenizer is None:
            return output.text
        whole = [*output.prompt_token_ids, *output.token_ids]
        return str(self.tokenizer.decode(whole, skip_special_tokens=True))


def _limited(num_prompt_tokens: int, new_tokens: int | None, length: int | None) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens(new_tokens, length, num_prompt_tokens))


def _check_model(model_or_path: object) -> None:
    if isinstance(model_or_path, (nn.Module, str, Path)):
        return
    raise UnsupportedModelError(
        f"model_or_path is a {type(model_or_path).__name__}; decoders alone are served, diffusion models are not",
        remedy="give a Hugging Face model, or the folder of its checkpoint",
    )


def _shardformer(config: InferenceConfig, policy: object) -> InferenceShardformer:
    """Ours; ColossalAI's, which needs it installed, where one of its policies is to place the modules."""
    if policy is None or isinstance(policy, Policy):
        return InferenceShardformer(config.shard, config.inference)
    from inference_shardformer.bridges.colossalai.policies import PlacesNoPadding
    from inference_shardformer.bridges.colossalai.shardformer import ColossalInferenceShardformer

    if not isinstance(policy, PlacesNoPadding):
        raise PolicyError(
            f"model_policy is a {type(policy).__name__}, which places modules that our engine cannot run",
            remedy="derive it from InferencePolicy or LlamaInferencePolicy of inference_shardformer.bridges.colossalai",
        )
    return ColossalInferenceShardformer(config.shard, config.inference)
