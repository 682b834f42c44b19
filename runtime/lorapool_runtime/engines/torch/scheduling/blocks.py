"""Who holds which KV block: pure bookkeeping for the scheduler, the memory itself is `kv.KVPool`.

Block 0 is never given out: it stays zero, and block tables are padded with it, so that a row that reads
past its own end reads zeros and never another request's (perhaps non-finite) values.

    blank --allocate--> held --release--> blank                      held by one, or by many who share it
                         |  ^
          register(key)  v  | share                                  a registered block is full: nobody writes to it
                  held, registered --last release--> kept, by last use --allocate when nothing is blank--> held
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

NULL_BLOCK = 0


class OutOfBlocksError(RuntimeError):
    """`allocate` was called without asking `can_allocate` first."""


class BlockAllocator:
    """`total` usable blocks of `block_size` tokens, numbered from 1."""

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"need at least one block and one token per block, got {total} and {block_size}")
        self.total = total
        self.block_size = block_size
        self._blank = deque(range(1, total + 1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Registered blocks that nobody holds, the one unused longest first: they are free, and worth keeping."""
        self._holders = [0] * (total + 1)
        self._key_of: list[bytes | None] = [None] * (total + 1)
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `allocate` could give, those kept for their contents included."""
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that somebody holds; one held by many counts once."""
        return self.total - self.free

    @property
    def registered(self) -> int:
        return len(self._by_key)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int, *, beside: Iterable[int] = ()) -> bool:
        """Whether `count` more are there once the blocks `beside` have been shared."""
        revived = sum(not self._holders[block] for block in beside)
        return count + revived <= self.free

    def allocate(self, count: int) -> list[int]:
        """Blocks for one new holder. Their contents are another's: the caller has them wiped."""
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} blocks asked, {self.free} free")
        taken = [self._blank.popleft() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The registered blocks of the longest known beginning of a chain of keys. Changes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """One holder more for each of these registered blocks; nobody may write to them, nobody wipes them."""
        for block in blocks:
            if self._key_of[block] is None:
                raise ValueError(f"block {block} is not registered")
            self._kept.pop(block, None)
            self._holders[block] += 1

    def register(self, block: int, key: bytes) -> None:
        """From now on `find` gives this full, computed block. A key that another block has already stays with that."""
        if not self._holders[block]:
            raise ValueError(f"block {block} is not held")
        if self._key_of[block] is None and key not in self._by_key:
            self._key_of[block], self._by_key[key] = key, block

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds these blocks any more; who holds them keeps them."""
        for block in blocks:
            key = self._key_of[block]
            if key is not None:
                del self._by_key[key]
                self._key_of[block] = None
            if block in self._kept:
                del self._kept[block]
                self._blank.append(block)

    def release(self, blocks: list[int]) -> None:
        """One holder less for each; of a chain the last block is the first to be used for something else."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._kept[block] = None

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        key = self._key_of[block]
        assert key is not None  # only registered blocks are kept
        del self._by_key[key]
        self._key_of[block] = None
        return block
