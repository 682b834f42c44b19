"""`GET /v1/organization/usage/completions` and `/v1/organization/costs`, as OpenAI's official client speaks them.

    project_id   the namespace that pays             model       namespace/name of the adapter or base
    api_key_id   uid of the API key's Secret         line_item   <model>, input_tokens | residency | …

Buckets are whole UTC minutes, hours or days, from the one with `start_time` to the one before or with `end_time`; those
without usage are present and empty. What a key may not see is filtered out like what does not exist.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from aiohttp import web

from lorapool_api.openai import (
    ApiError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ServerError,
    UnavailableError,
)
from lorapool_gateway.routing.key_guard import KeyGuard
from lorapool_ledger.api.query import Call, Params, costs_call, usage_call
from lorapool_ledger.api.signing import Signer
from lorapool_ledger.reports.charges import API_UNITS, Charge, Dimension, charges
from lorapool_ledger.reports.money import plain
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.scope import Scope, scope_of
from lorapool_ledger.reports.usage import By, UsageRow, usage
from lorapool_ledger.store.database import Database, DatabaseAwayError

log = logging.getLogger(__name__)

PREFIX = "/v1/organization/"
ROUTE_COMPLETIONS = "/v1/organization/usage/completions"
ROUTE_COSTS = "/v1/organization/costs"
AWAY_RETRY_S = 5.0

_USAGE_COLUMNS = {"project_id": By.PROJECT, "api_key_id": By.KEY, "model": By.MODEL}
_USAGE_CONSTANTS = {"user_id": None, "batch": False, "service_tier": "default", "api_source": "unlabeled"}
"""Groups that have one value here: what the client's enumerations offer for it."""
_COST_DIMENSIONS = {"project_id": Dimension.PROJECT, "api_key_id": Dimension.KEY}

Results = dict[int, list[dict[str, Any]]]
"""Results by the start of their bucket."""


class OrganizationApi:
    def __init__(
        self,
        database: Database,
        keys: KeyGuard,
        cursors: Signer,
        *,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._keys = keys
        self._cursors = cursors
        self._now_unix_s = now_unix_s

    def add_routes(self, app: web.Application) -> None:
        """Adds the paths below `PREFIX`."""
        app.router.add_route("*", PREFIX + "{path:.*}", self.handle)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answers a request whose path begins with `PREFIX`; errors have OpenAI's form."""
        try:
            return _json(await self._answer(request))
        except ApiError as error:
            return _json(error.body(), error.status, error.headers())
        except DatabaseAwayError:
            away = UnavailableError(
                "The ledger's database does not answer.", code="database_away", retry_after_s=AWAY_RETRY_S
            )
            return _json(away.body(), away.status, away.headers())
        except Exception:
            log.exception("unexpected error", extra={"route": request.path[:200]})
            fault = ServerError("The ledger made an error; its log has the details.")
            return _json(fault.body(), fault.status)

    async def _answer(self, request: web.BaseRequest) -> dict[str, Any]:
        calls = {ROUTE_COMPLETIONS: (usage_call, self._usage), ROUTE_COSTS: (costs_call, self._costs)}
        if request.path not in calls:
            raise RouteNotFoundError(
                f"There is no {request.path[:200]}. The ledger has {ROUTE_COMPLETIONS} and {ROUTE_COSTS}."
            )
        if request.method != "GET":
            raise MethodNotAllowedError(f"{request.method} is not allowed here; use GET.")
        key = self._keys.authenticate(request.headers.get("Authorization"))
        parse, read = calls[request.path]
        params: Params = request.query
        call = parse(params, self._now_unix_s())
        scope = scope_of(key).narrowed(projects=call.projects, keys=call.keys, models=call.models)
        return await self._page(call, f"{request.path} {key.uid}", scope, read)

    async def _page(
        self,
        call: Call,
        caller: str,
        scope: Scope,
        read: Callable[[Call, Scope, Period], Awaitable[Results]],
    ) -> dict[str, Any]:
        """One page. The cursor holds the end, so that all pages together are one period, whenever they are read."""
        bound_to = f"{caller} {call.digest}"
        end = call.end_unix_s if call.end_unix_s is not None else int(self._now_unix_s()) + 1
        whole = call.period(end)
        if call.page is not None:
            cursor = self._cursors.read(call.page, bound_to=bound_to)
            if cursor is None:
                raise InvalidRequestError(
                    "page is not a cursor of this call: use `next_page` of the page before, with the same parameters "
                    "and the same API key.",
                    param="page",
                )
            whole = Period(int(cursor["next"]), int(cursor["end"]))
        size = call.width.seconds
        end_of_page = min(whole.end_unix_s, whole.start_unix_s + call.limit * size)
        part = Period(whole.start_unix_s, end_of_page)
        nothing = call.batch is True  # there are no batch jobs
        results = {} if nothing else await read(call, scope, part)
        more = end_of_page < whole.end_unix_s
        following = {"next": end_of_page, "end": whole.end_unix_s}
        return {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": bucket.start_unix_s,
                    "end_time": bucket.end_unix_s,
                    "results": results.get(bucket.start_unix_s, []),
                }
                for bucket in part.buckets(call.width)
            ],
            "has_more": more,
            "next_page": self._cursors.sign(following, bound_to=bound_to) if more else None,
        }

    async def _usage(self, call: Call, scope: Scope, period: Period) -> Results:
        by = [column for name, column in _USAGE_COLUMNS.items() if name in call.group_by]
        rows = await self._database.read(lambda connection: usage(connection, scope, period, call.width, by))
        return _by_bucket((row.start_unix_s, usage_result(row, by, call.group_by)) for row in rows)

    async def _costs(self, call: Call, scope: Scope, period: Period) -> Results:
        by_item = "line_item" in call.group_by
        by = {Dimension.DAY, *(item for name, item in _COST_DIMENSIONS.items() if name in call.group_by)}
        narrowed, wanted = scope, call.line_items
        if by_item or wanted is not None:
            by |= {Dimension.MODEL, Dimension.ITEM}
        if wanted is not None:
            narrowed = scope.narrowed(models={name.rpartition(", ")[0] for name in wanted})
        found = await self._database.read(lambda connection: charges(connection, narrowed, period, by))
        if wanted is not None:
            found = [charge for charge in found if charge.line_item in wanted]
        if wanted is not None and not by_item:
            found = _without_items(found)
        return _by_bucket((charge.day_unix_s, cost_result(charge, call.group_by)) for charge in found)


def usage_result(row: UsageRow, by: Sequence[By], group_by: Iterable[str]) -> dict[str, Any]:
    """A result of the usage call."""
    groups: dict[str, Any] = dict.fromkeys((*_USAGE_COLUMNS, *_USAGE_CONSTANTS))
    values = dict(zip(by, row.group, strict=True))
    for name in group_by:
        groups[name] = values[_USAGE_COLUMNS[name]] or None if name in _USAGE_COLUMNS else _USAGE_CONSTANTS[name]
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row.input_tokens,
        "output_tokens": row.completion_tokens,
        "input_cached_tokens": row.cached_tokens,
        "input_uncached_tokens": row.prompt_tokens,
        "num_model_requests": row.requests,
        **groups,
    }


def cost_result(charge: Charge, group_by: Iterable[str]) -> dict[str, Any]:
    """A result of the costs call. The amount is exact where it has at most 12 digits after the point."""
    by_item = "line_item" in group_by
    return {
        "object": "organization.costs.result",
        "amount": {"value": plain(charge.amount), "currency": charge.currency.lower()},
        "line_item": charge.line_item if by_item else None,
        "project_id": (charge.project or None) if "project_id" in group_by else None,
        "api_key_id": (charge.key_uid or None) if "api_key_id" in group_by else None,
        "user_id": None,
        "api_source": "unlabeled" if "api_source" in group_by else None,
        "quantity": _number(charge.quantity) if by_item else None,
        "quantity_unit": API_UNITS[charge.item] if by_item else None,
    }


def _without_items(found: Iterable[Charge]) -> list[Charge]:
    sums: dict[tuple[int, str, str, str], Decimal] = {}
    for item in found:
        group = (item.day_unix_s, item.project, item.key_uid, item.currency)
        sums[group] = sums.get(group, Decimal(0)) + item.amount
    return [
        Charge(day, project, key, "", "", Decimal(0), amount, currency)
        for (day, project, key, currency), amount in sums.items()
    ]


def _by_bucket(results: Iterable[tuple[int, dict[str, Any]]]) -> Results:
    found: Results = {}
    for start, result in results:
        found.setdefault(start, []).append(result)
    return found


def _number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else round(float(value), 9)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=json.dumps(body).encode(),
        status=status,
        headers={**(headers or {}), "Content-Type": "application/json", "Cache-Control": "no-store"},
    )
