"""The records of the journal as structs that are encoded in about a microsecond.

They have the fields and the JSON names of `lorapool_api.usage_protocol`, whose models are what the ledger parses. The
parties of an attempt (who asked, who pays, for what, of which pod) are encoded once; the attempts of the same parties
refer to them by a number, in the journal as in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from lorapool_api.usage_protocol import AttemptEnd


class Parties(msgspec.Struct, rename="camel", gc=False):
    """The fields of `usage_protocol.OpenedRecord` that are the same for many attempts."""

    key_uid: str
    key: str
    owner: str
    project: str
    model: str
    uid: str
    digest: str
    base_uid: str
    base: str
    pod_uid: str
    boot_id: str
    route: str
    stream: bool


class Opened(msgspec.Struct, tag_field="kind", tag="opened", rename="camel", gc=False):
    """The other fields of `usage_protocol.OpenedRecord`, with the number of its parties."""

    seq: int
    attempt: str
    request_id: str
    parties: int
    opened_unix_ms: int


class Closed(msgspec.Struct, tag_field="kind", tag="closed", rename="camel", omit_defaults=True, gc=False):
    """As `usage_protocol.ClosedRecord`."""

    seq: int
    attempt: str
    outcome: AttemptEnd
    closed_unix_ms: int
    code: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    cold_ms: int | None = None


class Refusals(msgspec.Struct, tag_field="kind", tag="refusals", rename="camel", gc=False):
    """As `usage_protocol.RefusalsRecord`."""

    seq: int
    minute_unix_s: int
    key_uid: str
    project: str
    code: str
    count: int


Record = Opened | Closed | Refusals


class Line(msgspec.Struct):
    """A line of the journal: records with numbers from `first` on, and parties that no earlier line of the file has."""

    first: int
    records: list[msgspec.Raw]
    parties: dict[int, msgspec.Raw] = {}


class _Reference(msgspec.Struct):
    parties: int = 0


_ENCODER = msgspec.json.Encoder()
_LINE = msgspec.json.Decoder(Line)
_REFERENCE = msgspec.json.Decoder(_Reference)


def encode(records: Sequence[Record]) -> bytes:
    """Encoded records, separated by commas."""
    return _ENCODER.encode(records)[1:-1]


def encode_parties(parties: Parties) -> bytes:
    return _ENCODER.encode(parties)


def by_number(parties: Mapping[int, bytes]) -> bytes:
    """A JSON object with encoded parties by their numbers."""
    return b"{%b}" % b",".join(b'"%d":%b' % (number, encoded) for number, encoded in parties.items())


def encode_line(first: int, parties: Mapping[int, bytes], records: bytes) -> bytes:
    """A `Line` with the records that `encode` gave."""
    if not parties:
        return b'{"first":%d,"records":[%b]}' % (first, records)
    return b'{"first":%d,"parties":%b,"records":[%b]}' % (first, by_number(parties), records)


def decode_line(body: bytes) -> Line:
    """Raises msgspec.MsgspecError if it is no line."""
    return _LINE.decode(body)


def parties_of(record: bytes) -> int:
    """The number of the parties of an encoded record; 0 if it has none."""
    return _REFERENCE.decode(record).parties
