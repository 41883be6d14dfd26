"""RequestBlocks: gives requests their cache blocks, and those that others have computed where they are the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from inference_shardformer.engine.request import Request
from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.prefix import BlockKey, PrefixCache, PrefixNode
from inference_shardformer.kv_cache.sizing import blocks_for


class Looked(NamedTuple):
    """Tokens of requests that were looked for in the prefix cache, and those among them that were found."""

    num_queried_tokens: int = 0
    num_cached_tokens: int = 0

    def plus(self, other: Looked) -> Looked:
        """Both together."""
        return Looked(
            self.num_queried_tokens + other.num_queried_tokens, self.num_cached_tokens + other.num_cached_tokens
        )


class RequestBlocks:
    """The block tables of running requests.

    With a prefix cache the full blocks at the start of a table are found ones, or become findable once computed; if
    another request has computed the same meanwhile, its block takes the place of the own one. `request.kept` has their
    nodes: `None` for a request that takes no part any more, because what it computed is not to be found.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        block_size: int,
        prefix_cache: PrefixCache | None = None,
        with_rope_lengths: bool = False,
    ) -> None:
        """`with_rope_lengths`: what is computed depends on `Request.rope_lengths`, too."""
        self.allocator = allocator
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._with_rope_lengths = with_rope_lengths
        self.looked = Looked()

    def fits(self, request: Request, *, spare: int) -> bool:
        """Whether all known tokens of a waiting request get blocks now and `spare` blocks are left over."""
        needed, num_free = blocks_for(request.num_tokens, self.block_size) + spare, self.allocator.num_free
        if needed <= num_free:
            return True
        if self.prefix_cache is None or needed - self._num_shareable(request) > num_free:
            return False
        return needed - sum(self.allocator.is_held(node.block) for node in self._find(request)) <= num_free

    def should_wait(self, request: Request, present: Iterable[tuple[Request, int]]) -> bool:
        """Whether half or more of what a waiting request lacks can be found after this step.

        `present` are requests of this step, each with its number of new tokens.
        """
        if self.prefix_cache is None:
            return False
        common = max((self._num_common(request, other, num_new) for other, num_new in present), default=0)
        if not common:
            return False
        num_found = len(self._find(request))
        return 2 * (common - num_found) * self.block_size >= request.num_tokens - num_found * self.block_size

    def enter(self, request: Request) -> Looked:
        """Give a request blocks for all its known tokens; it goes on after those that the cache holds."""
        self._start(request)
        self.extend(request, blocks_for(request.num_tokens, self.block_size) - len(request.block_table))
        if request.kept is None:
            return Looked()
        looked = Looked(request.num_tokens, request.num_computed_tokens)
        self.looked = self.looked.plus(looked)
        return looked

    def renew(self, request: Request) -> None:
        """Before a running request computes all its tokens anew: not in blocks that others may read or find."""
        if self.prefix_cache is not None:
            self._give_up(request)
            self._start(request)

    def num_slots(self, request: Request, *, spare: int) -> int:
        """Tokens behind its computed ones that a request could hold, with `spare` blocks left for others."""
        num_blocks = len(request.block_table) + max(0, self.allocator.num_free - spare)
        return num_blocks * self.block_size - request.num_computed_tokens

    def missing(self, request: Request, num_new_tokens: int) -> int:
        """How many blocks a request lacks for so many further tokens."""
        num_tokens = request.num_computed_tokens + num_new_tokens - len(request.block_table) * self.block_size
        return blocks_for(num_tokens, self.block_size) if num_tokens > 0 else 0

    def extend(self, request: Request, num_blocks: int) -> None:
        """Give a request further blocks."""
        request.block_table.extend(self.allocator.allocate(num_blocks))

    def keep_computed(self, requests: Iterable[Request]) -> None:
        """Make every full block findable that these requests have computed."""
        if self.prefix_cache is not None:
            for request in requests:
                self._keep(request, self.prefix_cache)

    def release(self, request: Request) -> None:
        """Take all blocks of a request; what it computed stays findable until a block is needed."""
        self.keep_computed([request])
        self._give_up(request)

    def forget_all(self, running: Iterable[Request]) -> None:
        """Let nothing be found that was computed so far, nor what `running` requests go on to compute after it."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
            for request in running:
                request.kept = None

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raise `StateError` if block tables, allocator and prefix cache disagree."""
        running = list(running)
        self.allocator.check_integrity(request.block_table for request in running)
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity()
        for request in running:
            kept = request.kept or []
            if [node.block for node in kept] != list(request.block_table[: len(kept)]):
                raise _corrupt(f"the kept blocks of request {request.request_id!r} are not those of its table")
            kept = kept[: request.num_computed_tokens // self.block_size]  # none where all is to be computed again
            if [node.key for node in kept] != list(self._keys(request, len(kept))):
                raise _corrupt(f"the kept blocks of request {request.request_id!r} do not hold its tokens")

    def _start(self, request: Request) -> None:
        """Begin an empty table with the blocks that are known."""
        if self.prefix_cache is None:
            return
        request.kept = self._find(request)
        blocks = [node.block for node in request.kept]
        self.allocator.share(blocks)
        request.block_table.extend(blocks)
        request.start_from(len(blocks) * self.block_size)

    def _find(self, request: Request) -> list[PrefixNode]:
        """Known blocks at the start of a request, but never all its tokens: the last one brings the logits."""
        keys = self._keys(request, self._num_shareable(request))
        return [] if self.prefix_cache is None else self.prefix_cache.find(request.sampling.cache_salt, keys)

    def _num_common(self, request: Request, other: Request, num_new_tokens: int) -> int:
        """Full blocks that `other` has computed after this step, and `request` begins with as well."""
        if other.kept is None or other.sampling.cache_salt != request.sampling.cache_salt:
            return 0
        most = min(self._num_shareable(request), (other.num_computed_tokens + num_new_tokens) // self.block_size)
        for index in range(most):
            if self._key(request, index) != self._key(other, index):
                return index
        return most

    def _num_shareable(self, request: Request) -> int:
        """Blocks behind whose tokens no logits are needed."""
        unscored = request.unscored_positions(0, request.num_tokens)
        return (min(unscored.start, request.num_tokens - 1) if unscored else request.num_tokens - 1) // self.block_size

    def _keys(self, request: Request, num_blocks: int) -> Iterator[BlockKey]:
        return (self._key(request, index) for index in range(num_blocks))

    def _key(self, request: Request, index: int) -> BlockKey:
        start = index * self.block_size
        end = start + self.block_size
        key = tuple(request.token_ids[start:end])
        return key + request.rope_key(start, end) if self._with_rope_lengths else key

    def _keep(self, request: Request, cache: PrefixCache) -> None:
        kept, table = request.kept, request.block_table
        if kept is None:
            return
        for index in range(len(kept), request.num_computed_tokens // self.block_size):
            own = table[index]
            node = cache.keep(kept[-1] if kept else request.sampling.cache_salt, self._key(request, index), own)
            if node.block != own:
                self.allocator.share([node.block])
                self.allocator.free([own])
                table[index] = node.block
            kept.append(node)

    def _give_up(self, request: Request) -> None:
        self.allocator.free(request.block_table)
        del request.block_table[:]
        request.kept = None


def _corrupt(message: str) -> StateError:
    return StateError(message, remedy="report this as a bug with the stack trace")
