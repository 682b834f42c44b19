"""Who holds which KV block: pure bookkeeping for the scheduler, the memory itself is `kv.KVPool`.

Block 0 is never given out: it stays zero, and block tables are padded with it, so that a row that reads
past its own end reads zeros and never another request's (perhaps non-finite) values.
"""

from __future__ import annotations

from collections import deque

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
        self._free = deque(range(1, total + 1))
        self._held = [False] * (total + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} blocks asked, {len(self._free)} free")
        taken = [self._free.popleft() for _ in range(count)]
        for block in taken:
            self._held[block] = True
        return taken

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self._held[block]:
                raise ValueError(f"block {block} is not held")
            self._held[block] = False
            self._free.append(block)
