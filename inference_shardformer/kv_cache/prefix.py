"""PrefixCache: finds blocks of the paged cache by the tokens that they hold, and by all that come before them."""

from __future__ import annotations

from collections.abc import Iterable

from inference_shardformer.errors import StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator

BlockKey = tuple[int, ...]
"""What one full block was computed from: its tokens, and what else its keys depend on. Of one length in one cache."""


class PrefixNode:
    """One full block that can be found: `key` is what it holds, after the blocks of `parent` and before.

    The parent of a first block is the salt of its request: only requests of the same salt find each other's blocks.
    """

    __slots__ = ("block", "key", "parent")

    def __init__(self, parent: PrefixParent, key: BlockKey, block: int) -> None:
        self.parent = parent
        self.key = key
        self.block = block


PrefixParent = PrefixNode | str | None


class PrefixCache:
    """A tree of full blocks. Whole keys are compared, so nothing is ever found that was not computed from the same.

        salt None -- (5, 6, 7, 8) block 2 -+- (9, 9, 1, 2) block 3
                                           +- (4, 4, 4, 4) block 7 --- (1, 2, 3, 4) block 5

    Who holds a block also holds all before it: a node may only be reclaimed after those behind it. The allocator's
    order does that, because the blocks of a sequence are given up from its end.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._nodes: dict[tuple[PrefixParent, BlockKey], PrefixNode] = {}
        self._by_block: dict[int, PrefixNode] = {}
        allocator.on_reclaim = self._forget
        self.num_reclaimed = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found, those in use included."""
        return len(self._by_block)

    def find(self, salt: str | None, keys: Iterable[BlockKey]) -> list[PrefixNode]:
        """The longest chain of known blocks for the first of `keys`; whoever wants them must share() them."""
        parent: PrefixParent = salt
        found = []
        for key in keys:
            node = self._nodes.get((parent, key))
            if node is None:
                break
            found.append(node)
            parent = node
        return found

    def keep(self, parent: PrefixParent, key: BlockKey, block: int) -> PrefixNode:
        """Make a held block findable. Returns its node, or that of the block which holds the same already."""
        known = self._nodes.get((parent, key))
        if known is not None:
            return known
        self._allocator.keep(block)
        node = self._nodes[parent, key] = self._by_block[block] = PrefixNode(parent, key, block)
        return node

    def clear(self) -> None:
        """Let nothing be found any more; blocks stay with those who hold them."""
        for block in self._by_block:
            self._allocator.drop(block)
        self._nodes.clear()
        self._by_block.clear()

    def check_integrity(self) -> None:
        """Raise `StateError` unless both tables agree, and idle blocks come before those that they follow."""
        order = {block: place for place, block in enumerate(self._allocator.idle_blocks)}
        if len(self._nodes) != len(self._by_block) or not order.keys() <= self._by_block.keys():
            raise _corrupt("an idle block cannot be found, or one is found twice")
        for block, node in self._by_block.items():
            parent = node.parent
            if node.block != block or self._nodes.get((parent, node.key)) is not node:
                raise _corrupt(f"block {block} is filed under something else")
            if not isinstance(parent, PrefixNode):
                continue
            if self._by_block.get(parent.block) is not parent:
                raise _corrupt(f"block {block} follows block {parent.block}, which cannot be found")
            if parent.block in order and order.get(block, len(order)) > order[parent.block]:
                raise _corrupt(f"block {parent.block} would be reclaimed before block {block}, which follows it")

    def _forget(self, block: int) -> None:
        node = self._by_block.pop(block)
        del self._nodes[node.parent, node.key]
        self.num_reclaimed += 1


def _corrupt(message: str) -> StateError:
    return StateError(f"the prefix cache is corrupt: {message}", remedy="report this as a bug with the stack trace")
