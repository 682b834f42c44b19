"""Blocks are given out once, come back once, and the null block never leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK, BlockAllocator, OutOfBlocksError


def test_blocks_for_rounds_up() -> None:
    allocator = BlockAllocator(4, 16)
    assert [allocator.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_asking_changes_nothing() -> None:
    allocator = BlockAllocator(4, 16)
    assert allocator.can_allocate(4)
    assert not allocator.can_allocate(5)
    assert allocator.free == 4


def test_more_than_there_is_raises_and_takes_nothing() -> None:
    allocator = BlockAllocator(2, 16)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(3)
    assert allocator.free == 2


def test_a_block_is_released_once() -> None:
    allocator = BlockAllocator(2, 16)
    blocks = allocator.allocate(1)
    allocator.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        allocator.release(blocks)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-6, 6), max_size=60))
def test_no_block_is_held_twice_or_lost(moves: list[int]) -> None:
    allocator = BlockAllocator(12, 4)
    held: list[list[int]] = []
    for move in moves:
        if move > 0 and allocator.can_allocate(move):
            held.append(allocator.allocate(move))
        elif move < 0 and held:
            allocator.release(held.pop(move % len(held)))
        flat = [block for blocks in held for block in blocks]
        assert len(flat) == len(set(flat)) == allocator.used
        assert NULL_BLOCK not in flat
    for blocks in held:
        allocator.release(blocks)
    assert allocator.free == 12


@pytest.mark.parametrize(("total", "block_size"), [(0, 4), (4, 0)])
def test_an_allocator_without_blocks_or_tokens_is_refused(total: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {total} and {block_size}"):
        BlockAllocator(total, block_size)


def test_one_block_of_one_token_is_enough() -> None:
    assert BlockAllocator(1, 1).allocate(1) == [1]


def test_a_block_that_was_never_allocated_is_neither_released_nor_registered() -> None:
    allocator = BlockAllocator(2, 4)
    with pytest.raises(ValueError, match="block 2 is not held"):
        allocator.release([2])
    with pytest.raises(ValueError, match="block 2 is not held"):
        allocator.register(2, b"key")
