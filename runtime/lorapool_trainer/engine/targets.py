"""Finds the linear layers that a job trains, by the names of the loaded base and peft's rules of matching them."""

from __future__ import annotations

from collections.abc import Sequence

from lorapool_artifacts.checks.module_names import Names
from lorapool_trainer.engine.settings import ALL_LINEAR

MAX_NAMED = 8


class TargetError(ValueError):
    """target_modules name nothing, or something that cannot be trained; the message says what can."""


def chosen_targets(target_modules: Sequence[str] | str, linears: Sequence[str]) -> tuple[str, ...]:
    """The full names that match, in the order of `linears`: all linear layers inside the base.

    Raises TargetError for a name or an expression that matches none.
    """
    if target_modules == ALL_LINEAR:
        return tuple(linears)
    given = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    unmatched = [each for each in given if not _matching(_setting(target_modules, each), linears)]
    if unmatched or not given:
        raise TargetError(_message(unmatched, linears))
    return _matching(target_modules, linears)


def _setting(target_modules: Sequence[str] | str, each: str) -> Sequence[str] | str:
    return each if isinstance(target_modules, str) else (each,)


def _matching(target_modules: Sequence[str] | str, linears: Sequence[str]) -> tuple[str, ...]:
    names = Names(target_modules)
    return tuple(linear for linear in linears if names.match(linear))


def _message(unmatched: Sequence[str], linears: Sequence[str]) -> str:
    leaves = sorted({linear.rpartition(".")[2] for linear in linears})
    shown = ", ".join(repr(each) for each in unmatched[:MAX_NAMED]) or "an empty list"
    return (
        f"target_modules: {shown} matches no linear layer inside the base; "
        f"name some of {', '.join(leaves)}, or use {ALL_LINEAR!r}"
    )
