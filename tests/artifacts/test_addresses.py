"""Which addresses sources may and may not connect to."""

from __future__ import annotations

import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.sources.address_guard import PeerGuard, is_forbidden, parse_address
from lorapool_artifacts.sources.http import retry_after_s


@pytest.mark.parametrize(
    ("address", "forbidden"),
    [
        ("169.254.169.254", True),
        ("169.254.0.1", True),
        ("fd00:ec2::254", True),
        ("fe80::1%eth0", True),
        ("::ffff:169.254.169.254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("2002:a9fe:a9fe::1", True),
        ("100.100.100.200", True),
        ("0.0.0.0", True),
        ("::", True),
        ("224.0.0.1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("fd00::1", False),
        ("8.8.8.8", False),
    ],
)
def test_metadata_and_link_local_addresses_are_forbidden_in_every_form(address: str, forbidden: bool) -> None:
    assert is_forbidden(parse_address(address)) is forbidden


def test_a_public_host_may_not_send_its_readers_into_the_private_network() -> None:
    guard = PeerGuard("registry.example", where="oci://registry.example/a")
    guard.check("registry.example", "93.184.216.34")
    guard.check("cdn.example", "93.184.216.35")
    with pytest.raises(ArtifactError) as caught:
        guard.check("internal.example", "10.0.0.7")
    assert caught.value.reason is FailureReason.INVALID_SOURCE


def test_a_private_host_may_name_its_private_neighbour_but_never_the_metadata() -> None:
    guard = PeerGuard("registry.lan", where="oci://registry.lan/a")
    guard.check("registry.lan", "10.0.0.1")
    guard.check("minio.lan", "10.0.0.2")
    with pytest.raises(ArtifactError):
        guard.check("registry.lan", "169.254.169.254")


def test_retry_after_is_read_as_seconds_or_as_a_date_within_an_hour() -> None:
    assert retry_after_s({"retry-after": " 12 "}) == 12
    assert retry_after_s({"Retry-After": "99999999999999"}) == 3600
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now_s=20) == 40
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now_s=90) == 0
    assert retry_after_s({"Retry-After": "soon"}) is None
    assert retry_after_s({}) is None
