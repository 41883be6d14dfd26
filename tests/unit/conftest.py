"""Fixtures: a tiny engine, whose next token is a function of what it reads back from the cache, and a store."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from config_stores import resolved

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, RaggedBatch
from inference_shardformer.config.inference import (
    CacheConfig,
    InferenceConfig,
    PromptConfig,
    SamplingDefaults,
    SchedulerConfig,
)
from inference_shardformer.config.model import ModelFacts
from inference_shardformer.config.resolved import ResolvedConfig
from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.config.store import ConfigStore
from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine.engine import InferenceEngine
from inference_shardformer.kernels.cpu.library import native, native_problem
from inference_shardformer.kv_cache.cache import PagedKVCache
from inference_shardformer.kv_cache.spec import KVCacheSpec

VOCAB_SIZE = 259  # the bytes, two special tokens, and one that makes the size odd
EOS = 256
CPU = torch.device("cpu")


def next_logits(token_ids: Sequence[int], rope_lengths: Sequence[int], alphabet: Sequence[int]) -> torch.Tensor:
    """Logits after a context; tokens outside `alphabet` have none."""
    seed = zlib.crc32(repr((list(token_ids), list(rope_lengths))).encode())
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[list(alphabet)] = torch.randn(len(alphabet), generator=torch.Generator().manual_seed(seed))
    return logits


class ByteTokenizer:
    """One token per byte; 256 and 257 are special."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        parts = []
        for token_id in token_ids:
            parts.append(bytes([token_id]) if token_id < 256 else b"" if skip_special_tokens else b"<special>")
        return b"".join(parts).decode(errors="replace")


class PlainBackend(AttentionBackend):
    """Writes as the contract says and leaves reading to the model."""

    name = "plain"

    @classmethod
    def reasons(cls, spec: AttentionSpec) -> list:
        return []

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        assert list(batch.host_query_lens) == batch.cu_seqlens_q.diff().tolist()
        assert list(batch.host_seq_lens) == batch.seq_lens.tolist()
        assert [n == 1 for n in batch.host_query_lens] == sorted([n == 1 for n in batch.host_query_lens], reverse=True)
        assert sum(n == 1 for n in batch.host_query_lens) == batch.num_decodes
        return AttentionMetadata(batch, kv_cache)

    def attend(self, q: torch.Tensor, cache: object, meta: AttentionMetadata) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class ContextModel:
    """Keys hold token ids, values hold rope lengths; padding columns of the logits would always win."""

    backend: PlainBackend
    vocab_range: tuple[int, int]
    local_vocab: int
    alphabet: Sequence[int]
    num_calls: int = 0
    fail_at: int = -1
    poison: int = -1  # a context that ends with this token has NaN logits
    batch_sizes: list[int] = field(default_factory=list)

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        attn_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor,
    ) -> SimpleNamespace:
        assert not use_cache
        self.num_calls += 1
        if self.num_calls == self.fail_at:
            raise RuntimeError("the model broke")
        batch, cache = attn_metadata.batch, attn_metadata.kv_cache.layer(0)
        self.batch_sizes.append(batch.num_seqs)
        rope = position_ids[-1] if position_ids.shape[0] == 2 else torch.zeros_like(input_ids[0])
        self.backend.write(input_ids[0].float().view(-1, 1, 1), rope.float().view(-1, 1, 1), cache, attn_metadata)
        rows = []
        wanted = logits_to_keep.tolist()
        ends = batch.cu_seqlens_q.tolist()
        for packed in wanted:
            row = next(i for i in range(batch.num_seqs) if ends[i] <= packed < ends[i + 1])
            length = batch.host_seq_lens[row] - (ends[row + 1] - 1 - packed)
            assert position_ids[0, packed].item() == length - 1
            rows.append(self._logits(batch.block_tables[row].long(), length, cache))
        logits = torch.stack(rows) if rows else torch.empty(0, self.local_vocab)
        return SimpleNamespace(logits=logits, greatest=None)

    def _logits(self, table: torch.Tensor, length: int, cache: object) -> torch.Tensor:
        token_ids = [int(t) for t in cache.keys[table].flatten()[:length]]
        rope_lengths = [int(t) for t in cache.values[table].flatten()[:length]]
        padded = torch.full((self.local_vocab,), 1000.0)
        start, end = self.vocab_range
        padded[: end - start] = next_logits(token_ids, rope_lengths, self.alphabet)[start:end]
        return torch.full_like(padded, torch.nan) if token_ids[-1] == self.poison else padded


@dataclass
class Setup:
    """What a test may choose about its engine."""

    num_blocks: int = 64
    block_size: int = 4
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_model_len: int = 128
    max_new_tokens: int = 16
    seed: int = 0
    sampling: dict[str, object] = field(default_factory=dict)
    template: str | None = None
    alphabet: Sequence[int] = range(256)
    length_dependent_rope: bool = False
    tokenizer: ByteTokenizer | None = field(default_factory=ByteTokenizer)
    fail_at: int = -1
    poison: int = -1
    overlap: str = "off"
    speculation: str = "off"
    prefix_caching: str = "off"

    def config(self) -> ResolvedConfig:
        inference = InferenceConfig(
            seed=self.seed,
            cache=CacheConfig(block_size=self.block_size, num_blocks=self.num_blocks),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                speculation=self.speculation,
            ),
            sampling=SamplingDefaults(**{"max_new_tokens": self.max_new_tokens, **self.sampling}),
            prompt=PromptConfig(template=self.template),
        )
        decided = (1, "cpu", 1, "fp32", "plain", self.max_model_len, ())
        return ResolvedConfig(
            ShardConfig(), inference, *decided, overlap=self.overlap, prefix_caching=self.prefix_caching
        )

    def facts(self) -> ModelFacts:
        return ModelFacts(
            architecture="Tiny",
            model_type="tiny",
            vocab_size=VOCAB_SIZE,
            hidden_size=1,
            intermediate_size=1,
            num_layers=1,
            total_num_heads=1,
            total_num_kv_heads=1,
            head_dim=1,
            max_position_embeddings=self.max_model_len,
            eos_token_ids=(EOS,),
            tie_word_embeddings=False,
            checkpoint_dtype=None,
            length_dependent_rope=self.length_dependent_rope,
        )

    def engine(self, group: object = None, guard: object = None) -> InferenceEngine:
        group = group or TensorParallelGroup.single(CPU)
        guard = guard or RankGuard(group, timeout_s=5.0)
        backend = PlainBackend(AttentionSpec(1, 1, 1, 1.0, torch.float32, CPU, self.block_size))
        local_vocab = -(-VOCAB_SIZE // group.size) + 1
        true_columns = local_vocab - 1
        vocab_range = (group.rank * true_columns, min((group.rank + 1) * true_columns, VOCAB_SIZE))
        return InferenceEngine(
            ContextModel(backend, vocab_range, local_vocab, self.alphabet, fail_at=self.fail_at, poison=self.poison),
            facts=self.facts(),
            config=self.config(),
            attention=backend,
            kv_cache=PagedKVCache(
                KVCacheSpec(1, 1, 1, self.block_size, torch.float32), num_blocks=self.num_blocks, device=CPU
            ),
            group=group,
            guard=guard,
            vocab_range=vocab_range,
            tokenizer=self.tokenizer,
        )

    def greedy(self, prompt: Sequence[int], num_tokens: int, *, ends_at: Sequence[int] = (EOS,)) -> list[int]:
        """The oracle: no cache, no batch, no schedule."""
        context = list(prompt)
        rope = [len(prompt)] * len(prompt) if self.length_dependent_rope else [0] * len(prompt)
        for _ in range(num_tokens):
            context.append(int(next_logits(context, rope, self.alphabet).argmax()))
            rope.append(len(context) if self.length_dependent_rope else 0)
            if context[-1] in ends_at:
                break
        return context[len(prompt) :]


class ThreadGroup:
    """The collectives of a group whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, mail: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.device, self.is_closed = rank, size, CPU, False
        self._mail, self._barrier = mail, barrier

    def _exchange(self, item: object) -> list:
        self._mail[self.rank] = item
        self._barrier.wait()
        items = list(self._mail)
        self._barrier.wait()
        return items

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(t.clone()), dim=dim)

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        return t.copy_(self._exchange(t.clone())[src])

    def broadcast_bytes(self, payload: bytes | None, *, src: int = 0) -> bytes:
        return self._exchange(payload)[src]

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        return self._exchange(payload)


class NullGuard:
    """Guards nothing."""

    def step(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, phase: str, facts: object) -> None:
        return None


def run_ranks(size: int, program: Callable[[ThreadGroup], object]) -> list[object]:
    """Run `program` once per rank; what each returned or raised, in rank order.

    A rank that waits for one that has ended gets a `BrokenBarrierError`.
    """
    results: list[object] = [None] * size
    mail: list[object] = [None] * size
    barrier = threading.Barrier(size, timeout=60.0)
    ended: list[int] = []

    def main(rank: int) -> None:
        try:
            results[rank] = program(ThreadGroup(rank, size, mail, barrier))
        except Exception as exc:  # noqa: BLE001 - handed to the test
            results[rank] = exc
        finally:
            ended.append(rank)

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if ended and barrier.n_waiting and barrier.n_waiting + len(ended) == size:
            barrier.abort()  # those that wait are waiting for ranks that have ended
        time.sleep(0.001)
    return results


def ragged_prompts(num_prompts: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of many lengths, among them one token and whole blocks."""
    rng = random.Random(seed)
    lengths = [1, 4, 8] + [rng.randint(1, longest) for _ in range(num_prompts)]
    return [[rng.randrange(256) for _ in range(length)] for length in lengths[:num_prompts]]


def assert_all_free(engine: InferenceEngine) -> None:
    """Nothing is left in the engine."""
    core = engine._core
    assert core is not None
    core.scheduler.check_integrity()
    assert engine.num_unfinished == 0
    assert core.live == {}
    assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_blocks


@pytest.fixture(params=native().isa_levels if native_problem() is None else ["none"])
def isa_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction-set level of the native kernels after the other."""
    library = native()
    before = library.isa_level
    library.set_isa_level(request.param)
    yield request.param
    library.set_isa_level(before)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The tools of the engine tests: importing them from another test file would need a package."""
    return SimpleNamespace(
        Setup=Setup,
        NullGuard=NullGuard,
        ByteTokenizer=ByteTokenizer,
        run_ranks=run_ranks,
        ragged_prompts=ragged_prompts,
        next_logits=next_logits,
        assert_all_free=assert_all_free,
        EOS=EOS,
        VOCAB_SIZE=VOCAB_SIZE,
    )


@pytest.fixture
def store() -> Iterator[ConfigStore]:
    """A store of a resolved configuration, closed in the end."""
    store = ConfigStore(resolved())
    yield store
    store.close()
