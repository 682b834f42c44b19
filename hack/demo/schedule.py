"""Runs steps that depend on each other, a bounded number at a time, and stops all of them at the first failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol


class StepError(Exception):
    """A step failed; the text says why and what to do."""

    def __init__(self, message: str, step: str = "") -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Step:
    """One step: `run` is called once every step that `after` names has ended well."""

    name: str
    title: str
    run: Callable[[], None]
    after: tuple[str, ...] = ()


class Reporter(Protocol):
    """Receives every start and end, in the order in which they happen."""

    def started(self, step: Step) -> None: ...

    def done(self, step: Step, seconds: float) -> None: ...


def ready(steps: Sequence[Step], started: set[str], done: set[str]) -> list[Step]:
    """The steps that may start now, in the order in which they were given. Pure."""
    return [step for step in steps if step.name not in started and done.issuperset(step.after)]


def check(steps: Sequence[Step]) -> None:
    """Raises ValueError unless each step follows the steps that it names, which also excludes cycles."""
    earlier: set[str] = set()
    for step in steps:
        if not earlier.issuperset(step.after) or step.name in earlier:
            raise ValueError(f"the step {step.name} must be unique and come after {', '.join(step.after)}")
        earlier.add(step.name)


def run_all(
    steps: Sequence[Step],
    *,
    at_most: int,
    reporter: Reporter,
    stop: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs every step, at most `at_most` of them at a time.

    When a step raises, or this thread is interrupted, no further step starts, `stop` ends what the running steps
    wait for, and the first exception is raised once all of them have returned.
    """
    check(steps)
    done: set[str] = set()
    running: dict[Future[None], tuple[Step, float]] = {}
    with ThreadPoolExecutor(at_most) as pool:
        try:
            while len(done) < len(steps):
                started = done | {step.name for step, _ in running.values()}
                for step in ready(steps, started, done)[: at_most - len(running)]:
                    reporter.started(step)
                    running[pool.submit(step.run)] = (step, clock())
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step, began = running.pop(future)
                    _raise_failure(future, step)
                    done.add(step.name)
                    reporter.done(step, clock() - began)
        except BaseException:
            stop()
            raise


def _raise_failure(future: Future[None], step: Step) -> None:
    try:
        future.result()
    except StepError as error:
        error.step = error.step or step.name
        raise
