"""Which sources a namespace may use, and with whose credentials they are read."""

from __future__ import annotations

from typing import Any

import artifact_zoo as zoo
import pytest
from artifact_hub import Hub

from lorapool_api.basemodel import Access
from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import inspect_adapter
from lorapool_artifacts.policy import (
    Permission,
    PolicyError,
    Rights,
    SourcePolicy,
    SourceRules,
    covers,
    parse_policy,
    prefix_parts,
)
from lorapool_artifacts.settings import AdapterLimits, SourceSettings
from lorapool_artifacts.uri import parse_uri

SHARED, OWN = Permission(Rights.SHARED), Permission(Rights.OWN)
SOURCES = ("hf://acme/private", "s3://owner/models/a", "oci://ghcr.io/acme/a:1", "pvc://models/team-a/secret-tune")


def rules(policy: dict[str, Any] | None = None, grants: dict[str, list[str]] | None = None) -> SourceRules:
    """The rules of a base in namespace `owner` that the namespaces team-a and team-b may use."""
    sources = [{"namespace": name, "prefixes": prefixes} for name, prefixes in (grants or {}).items()]
    access = Access.model_validate({"namespaces": ["team-a", "team-b"], "sources": sources})
    return SourceRules.of("owner", access, SourcePolicy.model_validate({"namespaces": policy or {}}))


@pytest.mark.parametrize("uri", SOURCES)
def test_the_bases_own_namespace_reads_every_source_with_the_shared_rights(uri: str) -> None:
    assert rules().permission("owner", uri) == SHARED


@pytest.mark.parametrize("uri", SOURCES[:3])
def test_a_guest_reads_with_its_own_credentials_or_none(uri: str) -> None:
    assert rules().permission("team-b", uri) == OWN


def test_a_guest_names_no_folder_of_the_owners_volume() -> None:
    with pytest.raises(ArtifactError, match=r"spec\.access\.sources") as caught:
        rules().check("team-b", SOURCES[3])
    assert caught.value.reason is FailureReason.SOURCE_NOT_PERMITTED
    assert not caught.value.transient


def test_a_grant_is_for_one_guest_and_below_one_prefix() -> None:
    granted = rules(grants={"team-b": ["pvc://models/team-b/", "s3://owner/models/team-b"]})
    assert granted.permission("team-b", "pvc://models/team-b/tune") == SHARED
    assert granted.permission("team-b", "s3://owner/models/team-b/tune") == SHARED
    assert granted.permission("team-b", "s3://owner/models/team-bc/tune") == OWN
    assert granted.permission("team-b", "pvc://models/team-a/tune").refused
    assert granted.permission("team-a", "pvc://models/team-b/tune").refused


def test_an_owner_grants_no_more_than_it_may_use() -> None:
    only_hf = {"owner": {"prefixes": ["hf://owner/"], "credentials": "Shared"}, "other": {}}
    granted = rules(only_hf, grants={"team-b": ["s3://", "pvc://", "hf://owner/"]})
    assert granted.permission("team-b", "hf://owner/tune") == SHARED
    assert granted.permission("team-b", "s3://private/tune") == OWN
    assert granted.permission("team-b", "pvc://models/tune").refused


def test_an_entry_of_the_administrator_bounds_what_a_namespace_names() -> None:
    bounded = rules({"team-b": {"prefixes": ["hf://team-b/", "pvc://models/team-b/"]}, "owner": {"prefixes": []}},
                    grants={"team-b": ["s3://owner/"]})  # fmt: skip
    assert bounded.permission("team-b", "hf://team-b/tune@main") == OWN
    assert bounded.permission("team-b", "pvc://models/team-b/tune") == SHARED
    for uri in ("hf://acme/tune", "s3://owner/tune", "pvc://models/team-a/tune"):
        assert "artifacts.policy" in bounded.permission("team-b", uri).refused
    assert bounded.permission("owner", "hf://acme/base").refused
    assert bounded.permission("team-a", "hf://acme/tune") == OWN


def test_an_entry_chooses_the_credentials_and_the_star_is_for_those_without_one() -> None:
    chosen = rules({"team-b": {"credentials": "Shared"}, "owner": {"credentials": "Own"}, "*": {"prefixes": ["hf://"]}})
    assert chosen.permission("team-b", "s3://owner/tune") == SHARED
    assert chosen.permission("owner", "s3://owner/base") == OWN
    assert chosen.permission("team-a", "hf://acme/tune") == OWN
    assert chosen.permission("team-a", "s3://public/tune").refused


@pytest.mark.parametrize("namespace", ["owner", "team-b"])
def test_objects_of_the_store_are_read_by_their_own_namespace_with_its_own_rights(namespace: str) -> None:
    for found in (rules(), rules({namespace: {"credentials": "Shared"}}), rules(grants={"team-b": ["store://owner/"]})):
        assert found.permission(namespace, f"store://{namespace}/adapters/a") == OWN
        for foreign in ("store://team-a/adapters/a", f"store://{namespace}x/adapters/a", "store://files/a"):
            assert f"store://{namespace}/" in found.permission(namespace, foreign).refused


def test_an_entry_of_the_administrator_also_bounds_what_is_read_from_the_store() -> None:
    bounded = rules({"team-b": {"prefixes": ["hf://team-b/", "store://team-b/adapters/", "store://team-a/"]}})
    assert bounded.permission("team-b", "store://team-b/adapters/a") == OWN
    assert "artifacts.policy" in bounded.permission("team-b", "store://team-b/files/a").refused
    assert bounded.permission("team-b", "store://team-a/adapters/a").refused


@pytest.mark.parametrize(
    ("prefix", "covered", "not_covered"),
    [
        ("s3://aaa/b", ["s3://aaa/b", "s3://aaa/b/", "s3://aaa/b/c/d"],
         ["s3://aaa/bc", "s3://aaa", "s3://aaab/b", "s3://aaa/B/c"]),
        ("s3://bucket/", ["s3://bucket/x", "s3://bucket/"], ["s3://bucket2/x", "s3://bucket.x/y"]),
        ("hf://acme/", ["hf://acme/m", "hf://acme/m@v1"], ["hf://acme2/m", "hf://Acme/m"]),
        ("hf://acme/m", ["hf://acme/m@refs/pr/1"], ["hf://acme/m2", "hf://acme/m.x"]),
        ("oci://Reg.Example/team", ["oci://reg.example/team:1", f"oci://REG.example/team/x@sha256:{'0' * 64}"],
         ["oci://reg.example/team-b:1", "oci://reg.example:5000/team:1", "oci://reg.example.evil/team:1"]),
        ("oci://reg:5000", ["oci://reg:5000/a:1"], ["oci://reg:50000/a:1", "oci://reg/a:1"]),
        ("pvc://models/team-b", ["pvc://models/team-b/x"], ["pvc://models/team-bc", "pvc://models2/team-b"]),
        ("s3://", ["s3://any/thing"], ["hf://any/thing"]),
        ("store://team-b/a", ["store://team-b/a", "store://team-b/a/b"], ["store://team-b/ab", "store://team-c/a"]),
    ],
)  # fmt: skip
def test_a_prefix_covers_whole_parts_of_a_path(prefix: str, covered: list[str], not_covered: list[str]) -> None:
    assert [uri for uri in covered if not covers([prefix], parse_uri(uri))] == []
    assert [uri for uri in not_covered if covers([prefix], parse_uri(uri))] == []


@pytest.mark.parametrize(
    "uri",
    [
        "s3://mine/ok/../../theirs/x",
        "s3://mine/ok/%2e%2e/theirs",
        "s3://mine/ok//x",
        "s3://mine/./x",
        "pvc://models/team-b/..",
        "pvc://models/team-b/%2e%2e/team-a",
        "pvc://models/team-b\\..\\team-a",
        "hf://acme/m@../../../x",
        "oci://reg.example/team/../other:1",
        "oci://user@reg.example/team:1",
        "oci://reg.example/team%2fx:1",
        "S3://mine/ok",
        "s3://mine/ok?versionId=1",
        "s3://mine/ok#x",
        "s3://mine/ok\u2215..",
    ],
)
def test_a_uri_that_could_be_read_in_two_ways_is_refused_before_any_rule(uri: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_uri(uri)


@pytest.mark.parametrize(
    "prefix",
    ["", "s3:/a", "ftp://a/", "s3://a//b", "s3://a/../b", "s3://a/%2e/", "oci://reg/a:1", "hf://a/b@main", "s3://a b/"],
)
def test_a_malformed_prefix_is_refused_and_covers_nothing(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        prefix_parts(prefix)
    assert not covers([prefix], parse_uri("s3://aaa/b"))


def test_a_folder_of_a_repository_is_covered_by_its_own_prefix_and_by_those_above_it() -> None:
    uri = parse_uri("hf://acme/runs/de/checkpoint-500@main")
    assert [p for p in ("hf://acme/runs/", "hf://acme/runs/de/", "hf://acme/runs/fr/") if covers([p], uri)] == [
        "hf://acme/runs/",
        "hf://acme/runs/de/",
    ]
    assert not covers(["oci://host/a/b/"], parse_uri("oci://host/a:v1/b")), "a folder is no repository"


@pytest.mark.parametrize(
    ("namespace", "entry", "granted", "folder"),
    [
        ("owner", None, None, ""),
        ("team-b", None, ["pvc://models/team-b/", "pvc://other/"], "team-b"),
        ("team-b", {"prefixes": ["pvc://models/shared/x/", "pvc://models/shared/"]}, None, "shared"),
        ("team-b", {"credentials": "Shared"}, ["pvc://models/team-b/"], ""),
        ("owner", {"prefixes": ["pvc://models/base/"]}, None, "base"),
    ],
)
def test_links_of_a_volume_stay_in_the_folder_that_the_namespace_may_read(
    namespace: str, entry: dict[str, Any] | None, granted: list[str] | None, folder: str
) -> None:
    made = rules({namespace: entry} if entry else None, {namespace: granted} if granted else None)
    uri = f"pvc://models/{folder or 'any'}/x/lora"
    assert made.permission(namespace, uri).refused == ""
    assert made.boundary(namespace, uri) == folder


def test_a_policy_that_cannot_be_read_names_the_field() -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: namespaces\.team-b\.prefix: Extra inputs"):
        parse_policy("namespaces: {team-b: {prefix: [a]}}", origin="policy.yaml")
    with pytest.raises(PolicyError, match="is not a prefix"):
        parse_policy("namespaces: {team-b: {prefixes: ['s3:/a']}}", origin="policy.yaml")
    assert parse_policy("", origin="policy.yaml") == SourcePolicy()


def test_the_rules_survive_the_file_that_runtimes_read() -> None:
    made = rules({"team-b": {"prefixes": ["hf://team-b/"]}}, grants={"team-a": ["pvc://models/team-a/"]})
    assert SourceRules.model_validate_json(made.model_dump_json(by_alias=True, exclude_none=True)) == made


async def test_with_a_tenants_credentials_no_other_reaches_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_process")
    hub.repos["acme/lora"] = zoo.adapter_files()
    shared = SourceSettings(hf_endpoint=hub.url, hf_token="hf_of_the_release")
    for credentials, expected in (({}, None), ({"HF_TOKEN": " hf_of_team_b\n"}, "Bearer hf_of_team_b")):
        hub.requests.clear()
        found = await inspect_adapter(
            "hf://acme/lora", None, None, None, AdapterLimits(8), shared.with_only(credentials)
        )
        assert found.compatibility.ok
        assert {headers.get("authorization") for _, _, headers in hub.requests} == {expected}


def test_a_tenants_secret_changes_no_endpoint() -> None:
    given = {"HF_ENDPOINT": "http://evil", "AWS_ENDPOINT_URL": "http://evil", "LORAPOOL_OCI_INSECURE_HOSTS": "*",
             "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}  # fmt: skip
    shared = SourceSettings(s3_access_key_id="a", s3_secret_access_key="b", s3_session_token="c", oci_password="d")
    made = shared.with_only(given)
    assert (made.hf_endpoint, made.s3_endpoint, made.oci_insecure_hosts) == (None, None, frozenset())
    assert (made.s3_access_key_id, made.s3_secret_access_key, made.s3_session_token) == ("key", "secret", None)
    assert made.oci_password is None
