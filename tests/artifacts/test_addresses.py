"""Which addresses sources may and may not connect to."""

from __future__ import annotations

import pytest
import requests

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_artifacts.sources.address_guard import AddressGuard, is_forbidden, is_private, parse_address
from lorapool_artifacts.sources.http import GuardedSession, retry_after_s


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


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "198.18.0.1",
        "0.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "fd00::1",
        "fec0::1",
        "::ffff:10.0.0.1",
        "::ffff:0:10.0.0.1",
        "::10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "2002:a00:1::1",
        "2001:db8::1",
    ],
)
def test_an_address_of_a_private_network_is_private_in_every_form(address: str) -> None:
    assert is_private(parse_address(address))
    guard = AddressGuard("oci://r.example/a")
    with pytest.raises(ArtifactError, match="private network") as caught:
        guard.addresses(address, 443)
    assert caught.value.reason is FailureReason.INVALID_SOURCE


@pytest.mark.parametrize("address", ["8.8.8.8", "2600::1", "64:ff9b::8.8.8.8"])
def test_a_public_address_is_not_refused(address: str) -> None:
    assert len(AddressGuard("oci://r.example/a").addresses(address, 443)) == 1


@pytest.mark.parametrize(
    "host", ["localhost", "registry", "kubernetes.default.svc", "a.svc.cluster.local", "metadata.google.internal"]
)
def test_a_name_of_a_private_network_is_refused_before_it_is_looked_up(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    for proxied in (True, False):
        with pytest.raises(ArtifactError, match="private network"):
            AddressGuard("oci://x/a").check_url(f"https://{host}./v2/", proxied=proxied)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "017700000001", "127.1", "[::ffff:127.0.0.1]"])
def test_a_number_that_means_a_private_address_is_refused_also_behind_a_proxy(host: str) -> None:
    for proxied in (True, False):
        with pytest.raises(ArtifactError, match="private network"):
            AddressGuard("oci://x/a").check_url(f"https://{host}/v2/", proxied=proxied)


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Every lookup gets the next of these answers, whatever the name."""
    left = list(answers)

    def found(*_: object, **__: object) -> list[object]:
        return [(0, 0, 0, "", (address, 443)) for address in left.pop(0)]

    monkeypatch.setattr("socket.getaddrinfo", found)


def test_one_private_address_of_a_name_is_enough_to_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, ["93.184.216.34", "10.0.0.7"], ["10.0.0.7"])
    with pytest.raises(ArtifactError, match="private network"):
        AddressGuard("oci://x/a").addresses("registry.example", 443)
    with pytest.raises(ArtifactError, match="private network"):
        AddressGuard("oci://x/a").check_url("https://registry.example/v2/", proxied=True)


def test_a_connection_is_opened_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address the second time changes nothing."""
    resolving(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    opened: list[str] = []

    def refuse(address: tuple[str, int], *_: object, **__: object) -> None:
        opened.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr("urllib3.util.connection.create_connection", refuse)
    deadline = Deadline(FetchLimits(), where="oci://rebinds.example/a")
    with GuardedSession(AddressGuard("oci://x/a"), deadline) as session, pytest.raises(requests.ConnectionError):
        session.get("https://rebinds.example/v2/")
    assert opened == ["93.184.216.34"]


def test_a_listed_host_may_be_private_but_never_at_a_metadata_address(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SourceSettings(private_hosts=frozenset({"registry.lan:5000", "hub.lan"}))
    guard = AddressGuard.of(settings, "oci://registry.lan:5000/a")
    resolving(monkeypatch, *[["10.0.0.1"]] * 4, ["169.254.169.254"])
    assert guard.addresses("registry.lan", 5000) == ["10.0.0.1"]
    assert guard.addresses("hub.lan", 1) == ["10.0.0.1"]
    for host, port in (("registry.lan", 5001), ("other.lan", 5000)):
        with pytest.raises(ArtifactError, match="private network"):
            guard.addresses(host, port)
    with pytest.raises(ArtifactError, match="no source may have"):
        guard.addresses("hub.lan", 1)


def test_plain_http_is_for_listed_hosts_only() -> None:
    guard = AddressGuard.of(SourceSettings(oci_insecure_hosts=frozenset({"registry.lan:5000", "other.lan"})), "oci://x")
    hosts = (("registry.lan", 5000), ("other.lan", 1), ("registry.lan", 80), ("127.0.0.1", 5000), ("ghcr.io", 80))
    assert [guard.permits_plain(*host) for host in hosts] == [True, True, False, False, False]
    with pytest.raises(ArtifactError, match="not listed for plain HTTP"):
        guard.check_url("http://ghcr.io/v2/", proxied=False)


def test_retry_after_is_read_as_seconds_or_as_a_date_within_an_hour() -> None:
    assert retry_after_s({"retry-after": " 12 "}) == 12
    assert retry_after_s({"Retry-After": "99999999999999"}) == 3600
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now_s=20) == 40
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, now_s=90) == 0
    assert retry_after_s({"Retry-After": "soon"}) is None
    assert retry_after_s({}) is None
