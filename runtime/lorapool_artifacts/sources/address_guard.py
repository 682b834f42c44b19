"""Decides which addresses sources are fetched from, before a connection to one is opened.

A tenant, a redirect or a registry's token realm names the host. Hosts must be public unless the administrator lists
them; addresses of cloud metadata services are refused for listed hosts too. Names are resolved here, all addresses are
checked and the connection is opened to one of them, so that a name that resolves differently the next time changes
nothing, and a refused address receives no packet. Plain HTTP is for listed hosts only.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import ANY_HOST, SourceSettings

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
)
_EMBEDDING = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96"))
"""Networks whose last 32 bits are an IPv4 address: NAT64, translated and compatible addresses."""
_NOT_PUBLIC = tuple(ipaddress.ip_network(text) for text in ("64:ff9b:1::/48", "fec0::/10"))
"""Local NAT64 and site-local addresses, which not every Python version counts as private."""
_INTERNAL_SUFFIXES = frozenset(
    ("localhost", "localdomain", "local", "internal", "intranet", "private", "lan", "home", "corp", "svc", "arpa")
)
"""Last labels of names that only private networks resolve."""


def parse_address(text: str) -> IpAddress:
    """Parses an address; an IPv4 address embedded in IPv6 is unwrapped. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and int(address) > 0xFFFF and any(address in network for network in _EMBEDDING):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return inner or address


def is_forbidden(address: IpAddress) -> bool:
    """Whether connections to the address are always refused."""
    return address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified


def is_private(address: IpAddress) -> bool:
    """Whether the address is not reachable on the public internet."""
    return not address.is_global or any(address in network for network in _NOT_PUBLIC)


def is_internal_name(host: str) -> bool:
    """Whether a host name, not an address, can only mean a host of a private network."""
    return "." not in host or host.rpartition(".")[2] in _INTERNAL_SUFFIXES


@dataclass(frozen=True, slots=True)
class AddressGuard:
    """The rules for the connections of one source. Entries are `host`, for every port, or `host:port`."""

    where: str
    """The source, for messages."""
    private: frozenset[str] = frozenset()
    """Hosts that may be at private addresses; `*` stands for all."""
    plain: frozenset[str] = frozenset()
    """Hosts that are reached over plain HTTP."""

    @classmethod
    def of(cls, settings: SourceSettings, where: str) -> AddressGuard:
        """The rules that the administrator set. A host that is listed for plain HTTP may be private."""
        plain = settings.oci_insecure_hosts
        return cls(where, settings.private_hosts | plain, plain)

    def with_endpoint(self, url: str) -> AddressGuard:
        """The rules for a source whose endpoint the administrator configured, at whatever address it is."""
        host, port = _host_and_port(url)
        entry = frozenset({f"{host}:{port}"})
        plain = self.plain | entry if url.startswith("http://") else self.plain
        return replace(self, private=self.private | entry, plain=plain)

    def permits_plain(self, host: str, port: int) -> bool:
        """Whether this host is reached over plain HTTP."""
        return _listed(self.plain, host, port)

    def check_url(self, url: str, *, proxied: bool) -> None:
        """Checks what a request's URL alone tells. Raises ArtifactError.

        A proxy looks names up itself, so behind one the addresses are checked that the name has here, if any.
        """
        host, port = _host_and_port(url)
        if not url.lower().startswith("https:") and not self.permits_plain(host, port):
            raise self._refused(f"{host} is not listed for plain HTTP", "artifacts.insecureRegistries")
        literal = _literal(host)
        if literal is not None:
            self._check(host, port, literal)
        elif is_internal_name(host) and not self._may_be_private(host, port):
            raise self._not_public(host)
        elif proxied:
            self._check_if_found(host, port)

    def addresses(self, host: str, port: int) -> list[str]:
        """Resolves a host and checks all its addresses. Raises ArtifactError, or socket.gaierror if it is unknown."""
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            self._check(host, port, parse_address(address))
        return addresses

    def check_host(self, url: str) -> None:
        """Checks the host of a URL for clients that open connections themselves. Raises ArtifactError."""
        proxied = select_proxy(url, get_environ_proxies(url)) is not None
        self.check_url(url, proxied=proxied)
        if not proxied:
            self._resolved(*_host_and_port(url))

    def _resolved(self, host: str, port: int) -> None:
        try:
            self.addresses(host, port)
        except OSError as error:
            raise ArtifactError(
                FailureReason.SOURCE_UNAVAILABLE, f"{self.where}: the host {host} is not found; it is retried."
            ) from error

    def _check_if_found(self, host: str, port: int) -> None:
        try:
            self.addresses(host, port)
        except OSError:
            return

    def _check(self, host: str, port: int, address: IpAddress) -> None:
        if is_forbidden(address):
            raise self._refused(f"{host} has an address that no source may have", "")
        if is_private(address) and not self._may_be_private(host, port):
            raise self._not_public(host)

    def _may_be_private(self, host: str, port: int) -> bool:
        return ANY_HOST in self.private or _listed(self.private, host, port)

    def _not_public(self, host: str) -> ArtifactError:
        return self._refused(f"{host} is inside a private network", "artifacts.privateHosts")

    def _refused(self, what: str, setting: str) -> ArtifactError:
        remedy = f", or ask the administrator to list the host in the chart's {setting}" if setting else ""
        return ArtifactError(
            FailureReason.INVALID_SOURCE, f"{self.where} is refused: {what}. Use a public host{remedy}."
        )


def _listed(entries: Iterable[str], host: str, port: int) -> bool:
    name = _normal(host)
    shown = f"[{name}]" if ":" in name else name
    return name in entries or shown in entries or f"{shown}:{port}" in entries


def _normal(host: str) -> str:
    return host.lower().strip("[]").rstrip(".")


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return _normal(parts.hostname or ""), parts.port or (443 if parts.scheme.lower() == "https" else 80)


def _literal(host: str) -> IpAddress | None:
    """The address that a host is written as, also in the short and numeric forms that resolvers accept."""
    try:
        return parse_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
