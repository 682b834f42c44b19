"""The quotas of namespaces and models, from a JSON file that the chart writes; those of keys are in their Secrets.

    {"namespaces": {"team-a": {"requestsPerMinute": 600}, "*": {…}}, "models": {"team-a/tone": {"moneyPerMonth": …}}}

`*` is for each namespace without an entry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from lorapool_api.quota_protocol import QUANTITY_MAX, Meter, parse_money
from lorapool_api.settings import SettingsError
from lorapool_api.trust.mounted_files import Stamp, stamp_of, why_unreadable
from lorapool_gateway.routing.auth import QUOTA_FIELDS

log = logging.getLogger(__name__)

RECHECK_S = 1.0
EVERY = "*"
Quantity = Annotated[int, Field(strict=True, ge=1, lt=QUANTITY_MAX)]
Limits = tuple[tuple[Meter, int], ...]


def _checked(text: str) -> str:
    parse_money(text)
    return text


Money = Annotated[str, Field(strict=True), AfterValidator(_checked)]


class _Strict(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class _Quota(_Strict):
    requests_per_minute: Quantity | None = None
    tokens_per_minute: Quantity | None = None
    tokens_per_month: Quantity | None = None
    money_per_month: Money | None = None

    @property
    def limits(self) -> Limits:
        found = self.model_dump(by_alias=True, exclude_none=True)
        limits = [(meter, found[name]) for name, meter in QUOTA_FIELDS.items() if name in found]
        if self.money_per_month is not None:
            limits.append((Meter.MONEY_PER_MONTH, parse_money(self.money_per_month)[0]))
        return tuple(limits)

    @property
    def currency(self) -> str:
        return parse_money(self.money_per_month)[1] if self.money_per_month is not None else ""


_NONE = _Quota()


class _File(_Strict):
    namespaces: Mapping[str, _Quota] = Field(default_factory=dict)
    models: Mapping[str, _Quota] = Field(default_factory=dict)


class QuotaFile:
    """The quotas as the file has them; a change is noticed within about a second."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError if the file cannot be used. None: there is none."""
        self._path = path
        self._clock = clock
        self._stamp: Stamp | None = None
        self._checked_s = clock()
        self._namespaces: Mapping[str, _Quota] = {}
        self._models: Mapping[str, _Quota] = {}
        if path is not None:
            self._stamp = stamp_of(path)
            self._read(path)

    @property
    def has_any(self) -> bool:
        """Whether the file declares a quota."""
        if self._path is None:
            return False
        self._read_if_changed(self._path)
        return bool(self._namespaces or self._models)

    def of(self, namespace: str, model: str) -> list[tuple[str, Limits]]:
        """The quotas that a request of this namespace to this model counts against, by scope."""
        if self._path is None:
            return []
        self._read_if_changed(self._path)
        found = []
        if limits := self._of_namespace(namespace).limits:
            found.append((f"project/{namespace}", limits))
        if limits := self._models.get(model, _NONE).limits:
            found.append((f"model/{model}", limits))
        return found

    def currency(self, scope: str) -> str:
        """Of the budget of money of a scope; empty where it has none."""
        kind, _, name = scope.partition("/")
        return (self._of_namespace(name) if kind == "project" else self._models.get(name, _NONE)).currency

    def _of_namespace(self, namespace: str) -> _Quota:
        return self._namespaces.get(namespace, self._namespaces.get(EVERY, _NONE))

    def _read_if_changed(self, path: Path) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < RECHECK_S:
            return
        self._checked_s = now_s
        if (stamp := stamp_of(path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read(path)
            log.info("read the changed quotas")
        except SettingsError as error:
            log.error("cannot use the changed quotas; the old ones stay in force", extra={"error": str(error)})

    def _read(self, path: Path) -> None:
        try:
            file = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"the file of quotas {path} cannot be read: {why_unreadable(error)}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise SettingsError(
                f"{path}: {where}: {first['msg']}. A quota is a whole number from 1 to 2^53 - 1, and of "
                'money an amount with its currency such as "25.50 EUR"; leave it out for no limit.'
            ) from None
        self._namespaces, self._models = file.namespaces, file.models
