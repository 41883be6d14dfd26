"""Puts the parts of an engine together."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from inference_shardformer.attention.switch import BackendSwitch
from inference_shardformer.compute.sampling import Draw, Greatest
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.engine.backend_switch import BackendSwitches
from inference_shardformer.engine.batch import BatchBuilder
from inference_shardformer.engine.calls import Outbox
from inference_shardformer.engine.core import EngineCore, StepGuard
from inference_shardformer.engine.desk import RequestDesk
from inference_shardformer.engine.detokenizer import Tokenizer
from inference_shardformer.engine.events import EventExchange
from inference_shardformer.engine.intake import Intake
from inference_shardformer.engine.live_updates import LiveUpdates
from inference_shardformer.engine.model_runner import ModelRunner
from inference_shardformer.engine.sampler import Sampler, TensorGroup
from inference_shardformer.engine.scheduler import Scheduler
from inference_shardformer.engine.scorer import Scorer
from inference_shardformer.engine.step_runner import StepRunner
from inference_shardformer.engine.weight_stream import WeightGroup, WeightWriter
from inference_shardformer.engine.weight_updates import WeightUpdates
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.prefix import PrefixCache


class EngineGroup(WeightGroup, TensorGroup, Protocol):
    """The collectives the engine uses."""

    @property
    def is_closed(self) -> bool:
        """Whether the ranks have given up."""


class EngineParts(NamedTuple):
    """What an engine consists of; `updates` and `store` outlive the others."""

    store: ConfigStore
    updates: LiveUpdates
    core: EngineCore
    desk: RequestDesk


def assemble(
    runner: ModelRunner,
    *,
    facts: ModelFacts,
    config: ResolvedConfig,
    group: EngineGroup,
    guard: StepGuard,
    vocab_range: tuple[int, int],
    tokenizer: Tokenizer | None,
    switch: BackendSwitch | None,
    weights: WeightWriter | None,
    draw: Draw | None = None,
    greatest: Greatest | None = None,
) -> EngineParts:
    """The parts, bound to each other. Raises `EnvironmentMismatchError` where ranks have other limits."""
    num_blocks, block_size = runner.kv_cache.num_blocks, runner.kv_cache.spec.block_size
    store = ConfigStore(config)
    intake = Intake(facts=facts, config=store, num_blocks=num_blocks, block_size=block_size, tokenizer=tokenizer)
    guard.agree("creation of the engine", intake.limits())
    exchange = EventExchange(group)
    updates = LiveUpdates(store, group, exchange)
    allocator = BlockAllocator(num_blocks)
    scheduler = Scheduler(
        allocator,
        block_size=block_size,
        prefix_cache=PrefixCache(allocator) if config.prefix_caching == "on" else None,
        with_rope_lengths=facts.length_dependent_rope,
    )
    switches = BackendSwitches(
        switch,
        runner=runner,
        store=store,
        updates=updates,
        group=group,
        exchange=exchange,
        blocks_in_use=lambda: scheduler.blocks_in_use,
        on_change=scheduler.forget_prefixes,
    )
    outbox = Outbox(defers=config.overlap == "on")
    sampler = Sampler(group, vocab_range, draw=draw, greatest=greatest, eos_token_ids=facts.eos_token_ids)
    core = EngineCore(
        steps=_step_runner(
            runner, scheduler, sampler, Scorer(group, vocab_range), facts=facts, config=config, group=group
        ),
        scheduler=scheduler,
        exchange=exchange,
        intake=intake,
        config=store,
        updates=updates,
        switches=switches,
        weights=WeightUpdates(weights, group=group, exchange=exchange, on_change=scheduler.forget_prefixes),
        guard=guard,
        eos_token_ids=facts.eos_token_ids,
        tokenizer=tokenizer,
        rope_switch_length=facts.rope_switch_length,
        meanwhile=outbox.catch_up,
    )
    return EngineParts(store, updates, core, RequestDesk(core, intake, outbox, is_alone=group.size == 1))


def _step_runner(
    runner: ModelRunner,
    scheduler: Scheduler,
    sampler: Sampler,
    scorer: Scorer,
    *,
    facts: ModelFacts,
    config: ResolvedConfig,
    group: EngineGroup,
) -> StepRunner:
    build = BatchBuilder(
        block_size=runner.kv_cache.spec.block_size,
        device=group.device,
        with_rope_lengths=facts.length_dependent_rope,
        padding=runner.num_padding,
    )
    return StepRunner(
        runner=runner,
        sampler=sampler,
        scorer=scorer,
        scheduler=scheduler,
        build=build,
        device=group.device,
        overlap=config.overlap == "on",
        is_given_up=lambda: group.is_closed,
    )
