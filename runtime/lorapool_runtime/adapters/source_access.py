"""With whose rights this runtime reads the sources of each namespace.

The operator decides by the same rules (`lorapool_artifacts.policy`) and writes them to a file, which is read again for
every use. The namespaces' own credentials come from the operator too, and stay in memory. A runtime without that file
serves one user, and reads every source with its own credentials.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.policy import Rights, SourceRules
from lorapool_artifacts.settings import SourceSettings

ARRIVAL_S = 3.0
"""By then the operator has delivered the credentials of a namespace that has just begun to use this runtime."""
REFUSALS = (FailureReason.UNAUTHORIZED, FailureReason.SOURCE_NOT_FOUND, FailureReason.SOURCE_UNAVAILABLE)
"""What sources answer to a reader without credentials."""


class SourceAccess:
    def __init__(self, settings: SourceSettings, rules_file: Path | None = None) -> None:
        self._settings = settings
        self._rules_file = rules_file
        self._own: Mapping[str, Mapping[str, str]] = {}
        self._given = asyncio.Event()
        self._awaited_until_s: dict[str, float] = {}

    def give(self, own: Mapping[str, Mapping[str, str]]) -> None:
        """Replaces the namespaces' own credentials."""
        self._own = own
        given, self._given = self._given, asyncio.Event()
        given.set()

    @asynccontextmanager
    async def reading(self, namespace: str, uri: str) -> AsyncIterator[SourceSettings]:
        """The endpoints and credentials for a source of this namespace, which is read inside.

        A namespace's first reads wait up to `ARRIVAL_S` for its credentials: the request that wakes a base, or that is
        the first of a new adapter, may be here before them.

        Raises ArtifactError: SourceNotPermitted; SourceUnavailable without readable rules, and while the credentials
        that the source asks for have not arrived.
        """
        if self._rules_file is None:
            yield self._settings
            return
        rules = _rules(self._rules_file)
        if rules.check(namespace, uri) is Rights.SHARED:
            yield self._settings.model_copy(update={"pvc_boundary": rules.boundary(namespace, uri)})
            return
        await self._arrival(namespace)
        try:
            yield self._settings.with_only(self._own.get(namespace, {}))
        except ArtifactError as error:
            if namespace in self._own or error.reason not in REFUSALS:
                raise
            message = f"The credentials of namespace {namespace} have not arrived at this runtime yet. {error.message}"
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message, retry_after_s=ARRIVAL_S) from error

    async def _arrival(self, namespace: str) -> None:
        """Returns when the namespace's credentials are here, or were awaited long enough."""
        if namespace in self._own:
            return
        until_s = self._awaited_until_s.setdefault(namespace, asyncio.get_running_loop().time() + ARRIVAL_S)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                while namespace not in self._own:
                    await self._given.wait()


def _rules(path: Path) -> SourceRules:
    try:
        return SourceRules.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        message = f"The rules for sources in {path} cannot be read ({type(error).__name__}); this is retried."
        raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message) from error
