"""Which pages of other origins may call the API from a browser, by the CORS protocol. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorapool_api.common import (
    HEADER_ADAPTER,
    HEADER_COLD_START,
    HEADER_PROCESSING_MS,
    HEADER_RELAXED,
    HEADER_REQUEST_ID,
)

ANY_ORIGIN = "*"
MAX_AGE_S = 600
"""For which a browser keeps the permission."""
_RATES = tuple(
    f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
)
_EXPOSED = ", ".join(
    (
        HEADER_REQUEST_ID,
        HEADER_ADAPTER,
        HEADER_COLD_START,
        HEADER_PROCESSING_MS,
        HEADER_RELAXED,
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        *_RATES,
    )
)
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(, ?[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Cors:
    def __init__(self, origins: frozenset[str]) -> None:
        """`origins`: as `Origin` has them, or "*"."""
        self._origins = origins

    def headers(self, request: Mapping[str, str]) -> dict[str, str]:
        """The headers of an answer, which let the page read it; empty for other requests."""
        if not self._origins or not self._permits(request.get("Origin")):
            return {}
        return {**self._origin(request["Origin"]), "Access-Control-Expose-Headers": _EXPOSED}

    def preflight(self, request: Mapping[str, str], methods: Iterable[str]) -> dict[str, str] | None:
        """The headers that permit these methods; None for what is no preflight, or of an origin that may not call."""
        if "Access-Control-Request-Method" not in request or not self._permits(request.get("Origin")):
            return None
        wanted = request.get("Access-Control-Request-Headers", "")
        allowed = {"Access-Control-Allow-Headers": wanted} if _NAMES.fullmatch(wanted) else {}
        return {
            **self._origin(request["Origin"]),
            "Access-Control-Allow-Methods": ", ".join(sorted(methods)),
            "Access-Control-Max-Age": str(MAX_AGE_S),
            **allowed,
        }

    def _permits(self, origin: str | None) -> bool:
        return origin is not None and (origin in self._origins or ANY_ORIGIN in self._origins)

    def _origin(self, origin: str) -> dict[str, str]:
        if ANY_ORIGIN in self._origins:
            return {"Access-Control-Allow-Origin": ANY_ORIGIN}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
