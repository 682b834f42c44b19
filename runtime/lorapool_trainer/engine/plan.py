"""Which examples form a job's batches and micro-batches, and which micro-batches are computed together. Pure.

A job's micro-batches are a function of its own settings and examples. Neighbours only decide which of them are in the
same cycle: that a job ends with the same bits as alone depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorapool_trainer.engine.settings import JobSettings, steps_per_epoch


@dataclass(frozen=True, slots=True)
class Offer:
    """What a job could compute next."""

    uid: str
    tokens: tuple[int, ...]
    """Of each remaining micro-batch of its current step, in order; empty when the job is finished."""


@dataclass(frozen=True, slots=True)
class Take:
    """The first micro-batches of a job's offer that one cycle computes."""

    uid: str
    micro_batches: int


def batch_of(settings: JobSettings, examples: int, step: int) -> tuple[int, ...]:
    """Indices of the examples of an optimiser step, counted from 0. Each epoch has an order of its own."""
    epoch, at = divmod(step, steps_per_epoch(settings, examples))
    order = list(range(examples))
    random.Random(f"{settings.seed}/{epoch}").shuffle(order)
    return tuple(order[at * settings.batch_size : (at + 1) * settings.batch_size])


def micro_batches(tokens: Sequence[int], limit: int) -> tuple[range, ...]:
    """Splits examples with so many tokens, in order, into groups of at most `limit` tokens, each of at least one."""
    groups: list[range] = []
    begin = size = 0
    for index, count in enumerate(tokens):
        if index > begin and size + count > limit:
            groups.append(range(begin, index))
            begin, size = index, 0
        size += count
    return (*groups, range(begin, len(tokens))) if tokens else ()


def plan_cycle(offers: Sequence[Offer], budget: int) -> tuple[Take, ...]:
    """Goes round the jobs in the given order, one micro-batch a turn, while the tokens fit in the budget.

    The first micro-batch is always taken, so that one that is larger than the budget is computed by itself.
    """
    taken = dict.fromkeys((offer.uid for offer in offers), 0)
    used = 0
    for offer, tokens in _turns(offers, taken):
        if used and used + tokens > budget:
            continue
        taken[offer.uid] += 1
        used += tokens
    return tuple(Take(uid, count) for uid, count in taken.items() if count)


def _turns(offers: Sequence[Offer], taken: dict[str, int]) -> Iterator[tuple[Offer, int]]:
    """Each job's next micro-batch, round by round, until a round takes none."""
    before = -1
    while before != (before := sum(taken.values())):
        for offer in offers:
            if (at := taken[offer.uid]) < len(offer.tokens):
                yield offer, offer.tokens[at]
