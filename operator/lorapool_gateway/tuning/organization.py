"""For which namespace a call of the fine-tuning API acts. Pure.

An unknown namespace and one of another tenant look the same to a caller.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorapool_api.openai import InvalidRequestError, PermissionDeniedError
from lorapool_gateway.routing.auth import ApiKey

HEADER_ORGANIZATION = "OpenAI-Organization"
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Caller:
    """A key that may fine-tune, and the namespace that it acts for."""

    key: ApiKey
    namespace: str


def caller_of(key: ApiKey, organization: str | None) -> Caller:
    """Raises PermissionDeniedError, and InvalidRequestError where the namespace is not clear.

    `organization` is the header's value; without it the key's default namespace counts, or its only one.
    """
    if not key.fine_tuning:
        raise PermissionDeniedError(
            "This API key may not use files and fine-tuning. Ask the administrator to set fineTuning in its Secret."
        )
    if organization:
        known = _NAMESPACE.fullmatch(organization) if key.namespaces is None else organization in key.namespaces
        if not known:
            raise InvalidRequestError(
                f"The organization {organization[:64]!r} does not exist or this API key does not belong to it.",
                code="invalid_organization",
            )
        return Caller(key, organization)
    if key.default_namespace:
        return Caller(key, key.default_namespace)
    if key.namespaces is not None and len(key.namespaces) == 1:
        return Caller(key, next(iter(key.namespaces)))
    raise InvalidRequestError(
        f"This API key belongs to several organizations. Name one with the header {HEADER_ORGANIZATION}.",
        code="organization_required",
    )
