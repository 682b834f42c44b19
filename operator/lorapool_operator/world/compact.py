"""Keeps parsed objects small: what thousands of them have in common is stored once.

A parsed model takes several times the memory of its values: pydantic gives each one a dict that repeats the names of
the fields and a record of which fields were given, which no caller reads. Thousands of adapters have equal conditions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel

from lorapool_api.chat import ChatReport, TemplateOrigin
from lorapool_api.common import Condition
from lorapool_api.loraadapter import AdapterSource, BaseModelRef, LoraAdapterSpec, LoraAdapterStatus, UsagePart
from lorapool_api.protocol import AdapterReport

M = TypeVar("M", bound=BaseModel)

SHARED_CONDITIONS = 1024
"""Different conditions that are shared; one with a message of its own is replaced by the next."""
_GIVEN: set[str] = set()
"""Takes the place of every model's own set of given fields."""


def compact(model: M) -> M:
    """Makes a model and its parts a third smaller in place, and returns the model."""
    if model.__pydantic_fields_set__ is _GIVEN:
        return model  # as a whole
    object.__setattr__(model, "__pydantic_fields_set__", _GIVEN)
    _share_names(model)
    for value in model.__dict__.values():
        for part in value if type(value) is list else (value,):
            if isinstance(part, BaseModel):
                compact(part)
    return model


def _share_names(model: BaseModel) -> None:
    """Gives the model a dict that shares the names of the fields with all models of its class (PEP 412).

    Python makes such a dict when attributes are set one by one, not when a whole dict is assigned as pydantic does. It
    takes the names from the first instances of a class: hence the call for each class below, before any is parsed.
    """
    values = model.__dict__
    object.__delattr__(model, "__dict__")
    for name, value in values.items():
        object.__setattr__(model, name, value)


def compact_report(report: AdapterReport) -> AdapterReport:
    """Makes a runtime's report smaller, shares its names with other runtimes' reports, and returns it."""
    compact(report)
    values = report.__dict__
    _intern(values, "uid", "digest", "display")
    unused = _unused(report.usage.boot_id)
    if report.usage == unused:
        values["usage"] = unused
    values["chat"] = _same_chat(report.chat)
    return report


@functools.lru_cache(maxsize=SHARED_CONDITIONS)
def _unused(boot_id: str) -> UsagePart:
    return compact(UsagePart(boot_id=boot_id))


def compact_adapter(spec: LoraAdapterSpec, status: LoraAdapterStatus) -> None:
    """Makes an adapter smaller, and shares with others what is often equal: the base, the digest, the modules."""
    compact(spec)
    compact(status)
    _intern(spec.base_model_ref.__dict__, "name", "namespace")
    _intern(status.__dict__, "state", "digest")
    if status.judged is not None:
        status.__dict__.update(judged=sys.intern(status.judged))
    status.__dict__["chat"] = _same_chat(status.chat)
    status.__dict__["target_modules"] = _modules(tuple(status.target_modules))


def _same_chat(chat: ChatReport | None) -> ChatReport | None:
    return None if chat is None else _chat(chat.template, chat.template_digest, tuple(chat.stop_tokens), chat.problem)


@functools.lru_cache(maxsize=SHARED_CONDITIONS)
def _chat(
    template: TemplateOrigin, digest: str | None, stop_tokens: tuple[str, ...], problem: str | None
) -> ChatReport:
    return compact(
        ChatReport(template=template, template_digest=digest, stop_tokens=list(stop_tokens), problem=problem)
    )


def _intern(values: dict[str, Any], *names: str) -> None:
    values.update((name, sys.intern(values[name])) for name in names if values[name] is not None)


@functools.lru_cache(maxsize=SHARED_CONDITIONS)
def _modules(names: tuple[str, ...]) -> list[str]:
    return [sys.intern(name) for name in names]


def share_conditions(raw: Any) -> Any:
    """Parses the conditions of a status such that equal ones are one object; leaves what cannot be parsed as it is."""
    return [_shared(item) for item in raw] if isinstance(raw, list) else raw


def _shared(raw: Any) -> Any:
    try:
        return _condition(tuple(raw.items()))
    except (AttributeError, TypeError):  # no object, or one that has lists or objects as values
        return raw


@functools.lru_cache(maxsize=SHARED_CONDITIONS)
def _condition(items: Iterable[tuple[str, Any]]) -> Condition:
    return compact(Condition.model_validate(dict(items)))


def _learn_names(*classes: type[BaseModel]) -> None:
    for each in classes:
        first = object.__new__(each)
        for name in each.model_fields:
            object.__setattr__(first, name, None)


_learn_names(AdapterReport, AdapterSource, BaseModelRef, Condition, LoraAdapterSpec, LoraAdapterStatus, UsagePart)
