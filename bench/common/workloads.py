"""The workloads W1 to W7 as values: batches, arrival times and popularity, drawn from a seed.

All engines get exactly the same workloads. Standard library only, because it also runs in the baselines' virtual
environments. Prompts are random token ids, so that no prefix cache helps any engine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

REQUESTS = 16
PROMPT_TOKENS = 32
NEW_TOKENS = 64
RANK = 16
MIXED_RANKS = (4, 8, 16, 32, 64)
TOKEN_IDS = range(5, 49_000)
"""Ordinary tokens of the benchmark's base, without special ones."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A closed batch: all requests at once, greedy, `new` tokens each, end tokens ignored."""

    prompts: tuple[tuple[int, ...], ...]
    adapters: tuple[str | None, ...]
    """One per prompt; None is the base."""
    new: int

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.new

    def only(self, rows: Sequence[int], new: int | None = None) -> Batch:
        """Some of the rows, or fewer tokens: for a baseline too slow to run the whole batch in every round."""
        prompts = tuple(self.prompts[row] for row in rows)
        return Batch(prompts, tuple(self.adapters[row] for row in rows), self.new if new is None else new)


def adapter_name(number: int) -> str:
    return f"a{number:03}"


def mixed_name(number: int) -> str:
    """Adapters of rank 4, 8, 16, 32, 64, 4, …"""
    return f"m{number:03}"


def mixed_rank(number: int) -> int:
    return MIXED_RANKS[number % len(MIXED_RANKS)]


def w1(case: str, new: int = NEW_TOKENS, seed: int = 0) -> Batch:
    """`base`, `one`, `four` (4 adapters × 4 requests), `distinct16`, `mixed_ranks`, `shuffled` (distinct16's rows)."""
    draw = random.Random(seed)
    prompts = [tuple(draw.choices(TOKEN_IDS, k=PROMPT_TOKENS)) for _ in range(REQUESTS)]
    rows = range(REQUESTS)
    adapters: list[str | None]
    match case:
        case "base":
            adapters = [None for _ in rows]
        case "one":
            adapters = [adapter_name(0) for _ in rows]
        case "four":
            adapters = [adapter_name(row // 4) for row in rows]
        case "distinct16" | "shuffled":
            adapters = [adapter_name(row) for row in rows]
        case "mixed_ranks":
            adapters = [mixed_name(row) for row in rows]
        case _:
            raise ValueError(f"W1 has no case {case!r}")
    batch = Batch(tuple(prompts), tuple(adapters), new)
    if case == "shuffled":
        batch = batch.only(draw.sample(rows, k=REQUESTS))
    return batch


# --- open loops --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arbaseline:
    at_s: float
    """Seconds after the start of the load."""
    adapter: int
    """Rank of popularity, 0 the most popular."""
    prompt: tuple[int, ...]
    new: int


def popularity(adapters: int, alpha: float) -> list[float]:
    """Shares of a power law: the i-th most popular of n adapters gets a share proportional to i ** -alpha."""
    if adapters < 1 or alpha < 0:
        raise ValueError("popularity needs at least one adapter and an exponent of at least 0")
    weights = [(rank + 1) ** -alpha for rank in range(adapters)]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def gaps_s(draw: random.Random, per_s: float, cv: float = 1.0) -> float:
    """One gap between two arrivals: gamma-distributed with mean 1 / per_s. cv 1 is a Poisson process; larger values are
    bursts.
    """
    shape = 1.0 / (cv * cv)
    return draw.gammavariate(shape, 1.0 / (per_s * shape))


def open_loop(
    *,
    adapters: int,
    per_s: float,
    duration_s: float,
    alpha: float = 1.0,
    cv: float = 1.0,
    longest: int = 64,
    seed: int = 0,
) -> list[Arbaseline]:
    """W2 (cv 1, alpha 1), W3 (other alphas), W4 (other cvs): prompts and outputs are uniform in 1..longest tokens.

    Times, lengths and prompts depend on seed, rate and cv only, so that any number of adapters gets the same work.
    """
    times, lengths, choices = (
        random.Random(f"{seed} times"),
        random.Random(f"{seed} lengths"),
        random.Random(f"{seed} who"),
    )
    shares = popularity(adapters, alpha)
    arrivals: list[Arbaseline] = []
    at_s = gaps_s(times, per_s, cv)
    while at_s < duration_s:
        prompt = tuple(lengths.choices(TOKEN_IDS, k=lengths.randint(1, longest)))
        adapter = choices.choices(range(adapters), weights=shares)[0]
        arrivals.append(Arbaseline(at_s, adapter, prompt, lengths.randint(1, longest)))
        at_s += gaps_s(times, per_s, cv)
    return arrivals
