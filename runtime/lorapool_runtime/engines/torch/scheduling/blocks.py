"""Reference counts and prefix cache keys of the KV blocks. Pure: the memory itself is `KVPool`.

Block 0 is never allocated: it stays zero, and block tables are padded with it, so that a row that reads
past its own end reads zeros and never another request's (perhaps non-finite) values.

    blank --allocate--> held --release--> blank                      held by one sequence, or shared by many
                         |  ^
          register(key)  v  | share                                  a registered block is full and read-only
                  held, registered --last release--> cached, by last use --allocate when none is blank--> held
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

NULL_BLOCK = 0


class OutOfBlocksError(RuntimeError):
    """`allocate` was called for more blocks than are free: call `can_allocate` first."""


class BlockAllocator:
    """`total` usable blocks of `block_size` tokens, numbered from 1."""

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"need at least one block and one token per block, got {total} and {block_size}")
        self.total = total
        self.block_size = block_size
        self._blank = deque(range(1, total + 1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Registered blocks without a holder, least recently used first. They are free, but allocated last."""
        self._holders = [0] * (total + 1)
        self._key_of: list[bytes | None] = [None] * (total + 1)
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated, including those that are cached for their contents."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks with at least one holder; a shared block counts once."""
        return self.total - self.free

    @property
    def registered(self) -> int:
        """Blocks in the prefix cache, with or without a holder."""
        return len(self._by_key)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that this many tokens occupy."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int, *, once_shared: Iterable[int] = ()) -> bool:
        """Whether `count` blocks are still free after `share` has taken those of `once_shared`."""
        revived = sum(not self._holders[block] for block in once_shared)
        return count + revived <= self.free

    def held_once(self, blocks: Iterable[int]) -> int:
        """How many of the blocks become free when one holder releases them."""
        return sum(self._holders[block] == 1 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Allocates blocks for one holder. The caller must wipe their previous contents. Raises OutOfBlocksError."""
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} blocks requested, {self.free} free")
        taken = [self._blank.popleft() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The registered blocks for the longest known prefix of a chain of keys. Changes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each of these registered blocks. Raises ValueError for a block that is not registered."""
        for block in blocks:
            if self._key_of[block] is None:
                raise ValueError(f"block {block} is not registered")
            self._cached.pop(block, None)
            self._holders[block] += 1

    def register(self, block: int, key: bytes) -> None:
        """Adds a full, computed block to the prefix cache. Ignored where its key is registered already.

        Raises ValueError for a block without a holder.
        """
        if not self._holders[block]:
            raise ValueError(f"block {block} is not held")
        if self._key_of[block] is None and key not in self._by_key:
            self._key_of[block], self._by_key[key] = key, block

    def forget(self, blocks: Iterable[int]) -> None:
        """Removes the blocks from the prefix cache. Their holders keep them."""
        for block in blocks:
            key = self._key_of[block]
            if key is not None:
                del self._by_key[key]
                self._key_of[block] = None
            if block in self._cached:
                del self._cached[block]
                self._blank.append(block)

    def release(self, blocks: list[int]) -> None:
        """Decrements the reference counts. Later blocks of a prefix chain are evicted first.

        Raises ValueError for a block without a holder.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        assert key is not None  # only registered blocks are cached
        del self._by_key[key]
        self._key_of[block] = None
        return block
