"""`POST /v1/attempts`: takes the batches of gateways, which present the ledger's own token."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_api.usage_protocol import ROUTE_ATTEMPTS, BatchAnswer, GatewayBatch
from lorapool_ledger.intake.gateway_batch import DisorderError, take
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store.database import Database, DatabaseAwayError

log = logging.getLogger("lorapool_ledger")

MOST_BYTES = 16 * 2**20
"""Of a batch: 1000 records with the longest texts."""
RETRY_S = 1


def presents_token(masters: MasterTokens, authorization: str | None) -> bool:
    """Whether an Authorization header presents the ledger's token."""
    scheme, _, given = (authorization or "").partition(" ")
    presented = given.strip().encode(errors="replace")
    matches = [hmac.compare_digest(presented, token.encode()) for token in masters.current()]
    return scheme.lower() == "bearer" and any(matches)


def error_response(status: int, code: str, message: str, **headers: str) -> web.Response:
    """An error in the form of OpenAI's."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return web.json_response(
        body, status=status, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


class AttemptsIntake:
    def __init__(
        self,
        database: Database,
        masters: MasterTokens,
        metrics: Metrics,
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._masters = masters
        self._metrics = metrics
        self._now_s = now_s

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post(ROUTE_ATTEMPTS, self.handle)

    async def handle(self, request: web.Request) -> web.Response:
        """Answers after the commit: what is acknowledged is never lost."""
        if not presents_token(self._masters, request.headers.get("Authorization")):
            return error_response(401, "invalid_token", "Present the ledger's token: `Authorization: Bearer <token>`.")
        body = await request.read()
        try:
            batch = GatewayBatch.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            return error_response(400, "invalid_batch", f"The batch is not of the protocol: {where}: {first['msg']}.")
        began_s = time.monotonic()
        try:
            taken = await self._database.write(lambda connection: take(connection, batch, int(self._now_s())))
        except DisorderError as error:
            return error_response(400, "invalid_batch", str(error))
        except (DatabaseAwayError, DBAPIError) as error:
            log.warning(
                "a gateway's records were not committed; it sends them again", extra={"error": str(error)[:300]}
            )
            return self._again("the database does not take it")
        for gap in taken.gaps:
            log.error("records are lost", extra={"error": gap})
        self._metrics.gaps("gateway", len(taken.gaps))
        if taken.conflict:
            self._metrics.intake_failed("gateway")
            expected = taken.through + 1
            log.info("a gateway continued too far ahead", extra={"error": f"{batch.boot_id} is expected at {expected}"})
            message = (
                f"The next record of process {batch.boot_id} must have number {expected}: send on from there, "
                "or set lostBefore if it is lost."
            )
            answer = BatchAnswer(through=taken.through).model_dump(by_alias=True)
            error_body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "gap"}}
            return web.json_response(answer | error_body, status=409)
        self._metrics.committed("gateway", taken.new, time.monotonic() - began_s)
        return web.Response(
            body=BatchAnswer(through=taken.through).model_dump_json(by_alias=True), content_type="application/json"
        )

    def _again(self, why: str) -> web.Response:
        self._metrics.intake_failed("gateway")
        return error_response(
            503, "ledger_unavailable", f"Nothing was committed: {why}. Send the batch again.", Retry_After=str(RETRY_S)
        )
