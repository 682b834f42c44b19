"""The certificates of runtimes: what the operator issues, when it issues again, and what it refuses to start with."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from authority_kit import Tls, authority
from base_world import base
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from lorapool_api.pod_address import AUTHORITY, server_name
from lorapool_api.settings import SettingsError
from lorapool_operator.decisions.runtime_tls import TLS_SECRET, tls_entries
from lorapool_operator.effects.authority import VALIDITY, Authority, Pair
from lorapool_operator.effects.certificates import RECHECK_S, Certificates
from lorapool_operator.effects.cluster import ObjectNotFoundError
from lorapool_operator.world.cluster_cache import BaseObject, ClusterCache, Key, ObjectKind, UnreadableObject

NOW = datetime.now(UTC)


def of(name: str, namespace: str = "team") -> BaseObject:
    return replace(base(), meta=replace(base().meta, name=name, uid=f"{name}-uid", namespace=namespace))


class Secrets:
    """The Secrets of a cluster; counts what is asked and written."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.reads = 0
        self.writes = 0

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        assert (kind, name) == ("Secret", TLS_SECRET)
        self.reads += 1
        if namespace not in self.found:
            raise ObjectNotFoundError("404", 404)
        return self.found[namespace]

    async def apply_child(self, manifest: dict[str, Any]) -> dict[str, Any]:
        assert (manifest["kind"], manifest["metadata"]["name"]) == ("Secret", TLS_SECRET)
        self.writes += 1
        self.found[manifest["metadata"]["namespace"]] = manifest
        return manifest

    def names(self, namespace: str = "team") -> set[str]:
        return set(self.found[namespace]["data"])


class World:
    """Certificates of an operator whose clocks a test moves."""

    def __init__(self, root: Path, *bases: BaseObject) -> None:
        self.tls, self.secrets, self.cache = Tls(root), Secrets(), ClusterCache()
        self.now, self.tick = NOW, 0.0
        for item in bases:
            self.cache.bases.put(item)
        self.authority = Authority(root / "ours")
        self.certificates = Certificates(
            self.secrets,  # type: ignore[arg-type]  # the two calls that are needed
            self.cache,
            self.authority,
            now_unix_s=lambda: self.now.timestamp(),
            clock=lambda: self.tick,
        )

    async def ensure(self, item: BaseObject, *, after: timedelta = timedelta()) -> dict[str, str]:
        self.now += after
        self.tick += RECHECK_S
        await self.certificates.ensure(item)
        return dict(self.secrets.found[item.meta.namespace]["data"])


async def test_each_base_has_its_own_certificate_in_the_one_secret_of_its_namespace(tmp_path: Path) -> None:
    one, two, other = of("one"), of("two"), of("one", "other")
    world = World(tmp_path, one, two, replace(other, meta=replace(other.meta, uid="x-uid")))
    data = await world.ensure(one)
    assert world.secrets.names() == {*tls_entries("one-uid"), *tls_entries("two-uid")}
    assert len(set(data.values())) == 4
    owners = world.secrets.found["team"]["metadata"]["ownerReferences"]
    assert {owner["uid"] for owner in owners} == {"one-uid", "two-uid"}
    assert not any(owner.get("controller") or owner["blockOwnerDeletion"] for owner in owners)
    assert (world.secrets.reads, world.secrets.writes) == (1, 1)
    await world.certificates.ensure(two)
    assert (world.secrets.reads, world.secrets.writes) == (1, 1)  # known without another look
    assert await world.ensure(two) == data
    assert world.secrets.writes == 1


def test_a_certificate_is_for_its_base_and_for_nothing_else(tmp_path: Path) -> None:
    issuer = authority(tmp_path)
    pair = issuer.issue("base-uid", NOW)
    [found] = x509.load_pem_x509_certificates(pair.certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [server_name("base-uid")]
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert found.not_valid_after_utc - NOW <= VALIDITY
    key = serialization.load_pem_private_key(pair.key, password=None)
    assert key.public_key() == found.public_key()
    assert issuer.issue("base-uid", NOW).key != pair.key


@pytest.mark.parametrize(("days", "renewed"), [(0, False), (59, False), (61, True), (91, True)])
async def test_a_certificate_is_renewed_when_a_third_of_its_time_is_left(
    tmp_path: Path, days: int, renewed: bool
) -> None:
    world = World(tmp_path, of("one"))
    first = await world.ensure(of("one"))
    assert (await world.ensure(of("one"), after=timedelta(days=days)) != first) == renewed


def broken(issuer: Any, good: Pair, foreign: Pair) -> dict[str, Pair]:
    return {
        "of another base": issuer.issue("other-uid", NOW),
        "of another authority": foreign,
        "with the key of another": Pair(good.certificate, issuer.issue("one-uid", NOW).key),
        "without a key": Pair(good.certificate, b""),
        "cut": Pair(good.certificate[:200], good.key),
        "empty": Pair(b"", b""),
    }


def test_what_is_not_this_authoritys_for_this_base_is_due_at_once(tmp_path: Path) -> None:
    issuer = authority(tmp_path / "ours")
    good, foreign = issuer.issue("one-uid", NOW), authority(tmp_path / "theirs").issue("one-uid", NOW)
    assert issuer.renewal_s(good, "one-uid") > NOW.timestamp()
    for what, pair in broken(issuer, good, foreign).items():
        assert issuer.renewal_s(pair, "one-uid") == 0.0, what


async def test_a_replaced_authority_issues_all_certificates_again(tmp_path: Path) -> None:
    world = World(tmp_path, of("one"), of("two"))
    before = await world.ensure(of("one"))
    new = authority(tmp_path / "ours")
    await world.certificates.ensure(of("one"))  # without waiting for the next look
    after = world.secrets.found["team"]["data"]
    assert not set(before.values()) & set(after.values())
    assert world.authority.issuer().certificate == new.certificate


async def test_an_authority_that_cannot_be_used_keeps_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, of("one"))
    before = await world.ensure(of("one"))
    (tmp_path / "ours" / "tls.key").write_text("no key")
    for _ in range(3):
        assert await world.ensure(of("one")) == before
    assert caplog.text.count("cannot use the changed authority") == 1
    assert "no key" not in caplog.text


async def test_a_deleted_or_changed_secret_is_written_again(tmp_path: Path) -> None:
    world = World(tmp_path, of("one"))
    await world.ensure(of("one"))
    del world.secrets.found["team"]["data"]["one-uid.key"]
    assert set(await world.ensure(of("one"))) == set(tls_entries("one-uid"))
    world.secrets.found.clear()
    assert set(await world.ensure(of("one"))) == set(tls_entries("one-uid"))


async def test_the_certificate_of_a_deleted_base_goes_and_that_of_an_unreadable_one_stays(tmp_path: Path) -> None:
    world = World(tmp_path, of("one"), of("two"), of("three"))
    await world.ensure(of("one"))
    for name in ("two", "three"):
        world.cache.bases.drop("team", name)
    raw = {"metadata": {"name": "three", "namespace": "team", "uid": "three-uid"}}
    world.cache.unreadable[Key(ObjectKind.BASE, "team", "three")] = UnreadableObject(raw, "")
    world.cache.unlisted = {"team"}
    world.cache.bases.put(of("four"))
    await world.ensure(of("four"))
    assert tls_entries("two-uid")[0] in world.secrets.names()  # it may exist
    world.cache.unlisted = set()
    world.cache.bases.put(of("five"))
    await world.ensure(of("five"))
    kept = {entry for name in ("one", "three", "four", "five") for entry in tls_entries(f"{name}-uid")}
    assert world.secrets.names() == kept


def test_an_intermediate_authority_is_served_with_the_certificate_and_trusted_by_its_root(tmp_path: Path) -> None:
    root = authority(tmp_path / "root")
    issuer = authority(tmp_path / "between", signed_by=root)
    served = x509.load_pem_x509_certificates(issuer.issue("one-uid", NOW).certificate)
    assert [item.issuer for item in served] == [issuer.certificate.subject, root.certificate.subject]
    assert (tmp_path / "between" / AUTHORITY).read_bytes() == (tmp_path / "root" / AUTHORITY).read_bytes()


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    issuer = authority(tmp_path, days=10)
    pair = issuer.issue("one-uid", NOW)
    [found] = x509.load_pem_x509_certificates(pair.certificate)
    assert found.not_valid_after_utc == issuer.certificate.not_valid_after_utc
    assert issuer.renewal_s(pair, "one-uid") < issuer.certificate.not_valid_after_utc.timestamp()


def test_an_authority_that_expires_soon_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    authority(tmp_path / "long")
    assert caplog.text == ""
    short = authority(tmp_path / "short", days=20)
    assert "expires on" in caplog.text
    expiry_unix_s = short.certificate.not_valid_after_utc.timestamp()
    assert Authority(tmp_path / "short").expiry_unix_s() == expiry_unix_s


def test_files_that_are_no_authority_are_refused_at_the_start_and_named(tmp_path: Path) -> None:
    for name in ("good", "other", "missing", "garbage"):
        authority(tmp_path / name)
    with pytest.raises(SettingsError, match="CA:TRUE"):
        authority(tmp_path / "server", ca=False)
    (tmp_path / "missing" / "tls.key").unlink()
    (tmp_path / "garbage" / "tls.crt").write_text("x")
    (tmp_path / "good" / "tls.key").write_bytes((tmp_path / "other" / "tls.key").read_bytes())
    for name, problem in (("missing", "cannot be read"), ("garbage", "no certificate"), ("good", "not the key")):
        with pytest.raises(SettingsError, match=problem) as error:
            Authority(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "PRIVATE" not in str(error.value)
