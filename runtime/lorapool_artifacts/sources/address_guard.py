"""Refuses connections of sources to addresses that tenants must not reach.

A tenant or a redirect names the host. A host in the URI may be private, so that an in-cluster registry works. Refused
are link-local and other addresses of cloud metadata services, and redirects from a public host into the private
network. The checked address is the one of the open connection, so a name that resolves differently the second time
does not get around the check.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def parse_address(text: str) -> IpAddress:
    """Parses an address; an IPv4 address embedded in IPv6 is unwrapped. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def is_forbidden(address: IpAddress) -> bool:
    """Whether connections to the address are always refused."""
    return address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified


def is_private(address: IpAddress) -> bool:
    """Whether the address is not reachable on the public internet."""
    return not address.is_global


class PeerGuard:
    """Checks each connection of one source. `host` is the host in the URI."""

    def __init__(self, host: str, *, where: str) -> None:
        self._host = host.lower().strip("[]")
        self._where = where
        self._starts_private: bool | None = None

    def check_literal(self, host: str) -> None:
        """Raises ArtifactError when the host is written as a forbidden address, before a connection is opened."""
        try:
            address = parse_address(host.strip("[]"))
        except ValueError:
            return
        if is_forbidden(address):
            raise _refused(self._where, f"{host} is an address that no source may have")

    def check(self, host: str, peer: str) -> None:
        """Raises ArtifactError when `host` is connected to the forbidden address `peer`."""
        address = parse_address(peer)
        if is_forbidden(address):
            raise _refused(self._where, f"{host} is at {address}, an address that no source may have")
        if host.lower().strip("[]") == self._host:
            self._starts_private = is_private(address)
        elif is_private(address) and not self._starts_private:
            raise _refused(self._where, f"it redirects to {host} inside the private network")


def check_host(url: str, *, where: str) -> None:
    """Raises ArtifactError unless all addresses of the URL's host are allowed. For clients that hide connections.

    Behind a proxy, which looks names up itself, only an address that is written in the URL is checked.
    """
    host = urlsplit(url).hostname or ""
    if select_proxy(url, get_environ_proxies(url)) is not None:
        PeerGuard(host, where=where).check_literal(host)
        return
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{where}: the host {host} is not found; it is retried."
        ) from error
    for entry in found:
        address = parse_address(str(entry[4][0]))
        if is_forbidden(address):
            raise _refused(where, f"{host} is at {address}, an address that no source may have")


def _refused(where: str, what: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.INVALID_SOURCE, f"{where} is refused: {what}. Use a host that serves the files itself."
    )
