"""With whose rights this runtime reads the sources of each namespace.

The operator decides by the same rules (`lorapool_artifacts.policy`) and writes them to a file, which is read again for
every use. The namespaces' own credentials come from the operator too, and stay in memory. A runtime without that file
serves one user, and reads every source with its own credentials.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.policy import Rights, SourceRules
from lorapool_artifacts.settings import SourceSettings

ARRIVAL_S = 3.0
"""By then the operator has delivered credentials to a runtime that has just started."""


class SourceAccess:
    def __init__(self, settings: SourceSettings, rules_file: Path | None = None) -> None:
        self._settings = settings
        self._rules_file = rules_file
        self._own: Mapping[str, Mapping[str, str]] = {}

    def give(self, own: Mapping[str, Mapping[str, str]]) -> None:
        """Replaces the namespaces' own credentials."""
        self._own = own

    @contextmanager
    def reading(self, namespace: str, uri: str) -> Iterator[SourceSettings]:
        """The endpoints and credentials for a source of this namespace, which is read inside.

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
        try:
            yield self._settings.with_only(self._own.get(namespace, {}))
        except ArtifactError as error:
            if namespace in self._own or error.reason not in (
                FailureReason.UNAUTHORIZED,
                FailureReason.SOURCE_NOT_FOUND,
            ):
                raise
            message = f"The credentials of namespace {namespace} have not arrived at this runtime yet. {error.message}"
            raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message, retry_after_s=ARRIVAL_S) from error


def _rules(path: Path) -> SourceRules:
    try:
        return SourceRules.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        message = f"The rules for sources in {path} cannot be read ({type(error).__name__}); this is retried."
        raise ArtifactError(FailureReason.SOURCE_UNAVAILABLE, message) from error
