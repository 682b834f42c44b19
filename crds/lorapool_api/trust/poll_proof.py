"""How the two ends of a poll (`GET /v1/runtime`) prove themselves to each other without the bearer token. Pure.

Both know the SHA-256 of the base's bearer token, which is never sent. The poller authenticates a random nonce and the
uid of the pod that it means to reach; the runtime authenticates the same nonce, its own pod's uid and the body of its
response. A recorded response has an old nonce. A pod that passes the poll on to a true runtime gets no answer, since
that runtime has another uid. Only a pod that has proved itself is sent the token, with calls and requests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

SCHEME = "LorapoolPoll"
"""Scheme of the Authorization header of a poll."""
HEADER_PROOF = "x-lorapool-proof"
"""On the response to a poll: the runtime's proof."""

_CREDENTIALS = re.compile(r"([^\s:]{1,128}):([0-9a-f]{32}):([0-9a-f]{64})")


class ProofError(ValueError):
    """The response to a poll does not prove that it comes from the pod that was polled."""


class Challenge(NamedTuple):
    """What one poll asks the runtime to prove."""

    pod_uid: str
    nonce: str
    proof: str
    """The poller's own proof."""

    @classmethod
    def new(cls, token_sha256: str, pod_uid: str) -> Challenge:
        """Makes the challenge of one poll; its nonce is never used again."""
        nonce = secrets.token_hex(16)
        return cls(pod_uid, nonce, _mac(token_sha256, "poll", pod_uid, nonce))

    @classmethod
    def parse(cls, authorization: str) -> Challenge | None:
        """Parses an Authorization header. Returns None for any other scheme and for malformed credentials."""
        scheme, _, credentials = authorization.partition(" ")
        found = _CREDENTIALS.fullmatch(credentials)
        return cls(*found.groups()) if scheme == SCHEME and found is not None else None

    @property
    def authorization(self) -> str:
        """The value of the poll's Authorization header."""
        return f"{SCHEME} {self.pod_uid}:{self.nonce}:{self.proof}"

    def is_from(self, token_sha256: str) -> bool:
        """Returns whether the poller knows this hash."""
        return hmac.compare_digest(self.proof, _mac(token_sha256, "poll", self.pod_uid, self.nonce))

    def answer(self, token_sha256: str, body: bytes) -> str:
        """Returns the runtime's proof, which belongs to this body alone."""
        return _mac(token_sha256, "runtime", self.pod_uid, self.nonce, hashlib.sha256(body).hexdigest())

    def check(self, token_sha256: str, proof: str | None, body: bytes) -> None:
        """Raises ProofError unless a runtime that knows the hash sent this body for this challenge."""
        expected = self.answer(token_sha256, body)
        if proof is None or not hmac.compare_digest(proof.encode(), expected.encode()):
            raise ProofError("the response does not prove that it comes from a runtime of this base and this pod")


def _mac(token_sha256: str, *parts: str) -> str:
    return hmac.new(token_sha256.encode(), "\n".join(parts).encode(), hashlib.sha256).hexdigest()
