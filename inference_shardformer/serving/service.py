"""Service: what the routes work with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, time

from inference_shardformer import AsyncEngine, SamplingParams
from inference_shardformer.errors import RequestError
from inference_shardformer.serving.api_error import ApiError
from inference_shardformer.serving.chat_template import ChatTemplate
from inference_shardformer.serving.generation import Generation
from inference_shardformer.serving.metrics import Metrics
from inference_shardformer.serving.token_texts import TokenTexts

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Service:
    """A served model. `explain` gives the report of what was decided, as an object and as text."""

    engine: AsyncEngine
    models: tuple[str, ...]
    template: ChatTemplate
    tokens: TokenTexts
    metrics: Metrics
    explain: Callable[[], tuple[object, str]]
    api_keys: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time()))

    async def generation(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, param: str, started: float | None = None
    ) -> Generation:
        """Check every prompt, then queue all. An `ApiError` about a prompt names the field `param`."""
        started = perf_counter() if started is None else started
        self.engine.check_room(len(prompts))  # before the work of tokenising
        token_ids = [await self._validated(prompt, params, param) for prompt in prompts]
        return Generation(self.engine, token_ids, params, metrics=self.metrics, started=started)

    async def chat_token_ids(self, messages: Sequence[object]) -> list[int]:
        """The prompt of a conversation."""
        return await asyncio.to_thread(self.template.token_ids, messages)

    async def _validated(self, prompt: Prompt, params: SamplingParams, param: str) -> tuple[int, ...]:
        try:
            return await self.engine.validate(prompt, params)
        except RequestError as error:
            raise ApiError.of(error, param=param) from error
