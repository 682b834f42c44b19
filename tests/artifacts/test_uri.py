"""Source URIs: five schemes are parsed strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_artifacts.uri import HfUri, OciUri, PvcUri, S3Uri, StoreUri, parse_uri

DIGEST = f"sha256:{'ab' * 32}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", HfUri("HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("hf://acme/lora_v1.2@main", HfUri("acme/lora_v1.2", "main")),
        ("hf://acme/lora@refs/pr/1", HfUri("acme/lora", "refs/pr/1")),
        ("hf://acme/lora/checkpoint-500", HfUri("acme/lora", path="checkpoint-500")),
        ("hf://acme/lora/de/v1@refs/pr/1", HfUri("acme/lora", "refs/pr/1", "de/v1")),
        (
            "oci://registry:5000/acme/lora:v1/checkpoint-500",
            OciUri("registry:5000", "acme/lora", "v1", None, "checkpoint-500"),
        ),
        (f"oci://registry/lora@{DIGEST}/a/b", OciUri("registry", "lora", None, DIGEST, "a/b")),
        ("oci://127.0.0.1:5000/lorapool/base:v1", OciUri("127.0.0.1:5000", "lorapool/base", "v1")),
        ("oci://[::1]:5000/a", OciUri("[::1]:5000", "a")),
        ("oci://ghcr.io/acme/lora", OciUri("ghcr.io", "acme/lora")),
        (f"oci://registry.local/acme/lora@{DIGEST}", OciUri("registry.local", "acme/lora", None, DIGEST)),
        (f"oci://registry/acme/lora:v1@{DIGEST}", OciUri("registry", "acme/lora", "v1", DIGEST)),
        ("s3://my-bucket/some/where/", S3Uri("my-bucket", "some/where")),
        ("s3://my-bucket", S3Uri("my-bucket", "")),
        ("pvc://models/llama/.hidden/a b", PvcUri("models", "llama/.hidden/a b")),
        ("pvc://models", PvcUri("models", "")),
        ("store://team-a/adapters/1_a.b/", StoreUri("team-a", "adapters/1_a.b")),
        ("store://team-a", StoreUri("team-a", "")),
    ],
)
def test_a_good_uri_is_parsed_and_written_back(text: str, value: object) -> None:
    assert parse_uri(text) == value
    assert parse_uri(str(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "hf:/a/b", "http://host/x", "file:///etc/passwd", "HF://a/b", "hf://a", "hf://../b", "hf://a/..",
        "hf://a/b/../c", "hf://a/b//c", "oci://host/a:v1/../b",
        "hf://a/b@", "hf://a/b@-x", "hf://a/b@..", "hf://a/b@x/../y", "hf://a/b?x=1", "hf://a/b#x", "hf://a/b%2f", "hf://a\\b/c",
        "hf://a/b\n", "hf://ä/b", "oci://host", "oci:///repo", "oci://user:pw@host/repo", "oci://host:99999/repo",
        "oci://host:0/repo", "oci://host/Repo", "oci://host/a//b", "oci://host/../b", "oci://host/a:", "oci://host/a@sha256:12",
        "oci://ho..st/a", "oci://host/a@main", "s3://B/x", "s3://ab", "s3://bucket/../x", "s3://bucket//x", "s3://bu..cket/x",
        "s3://bucket/./x", "pvc://Claim/x", "pvc://claim/../x", "pvc://claim/x/..", "pvc://../x", "pvc:///x", "pvc://claim//x",
        "pvc://claim/x\0", "pvc://claim/..x/",
        "store://", "store://Team/a", "store://a/../b", "store://a/.b", "store://a//b", "store://a/b c", "store://a/b#1",
        "store://_expiry/1", "hf://" + "a" * 600,
    ],
)  # fmt: skip
def test_anything_else_is_a_value_error_with_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ .*\w+"):
        parse_uri(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", "hf://org/name"),
        ("https://huggingface.co/org/name/", "hf://org/name"),
        ("https://huggingface.co/org/name/tree/main/checkpoint-500", "hf://org/name/checkpoint-500"),
    ],
)
def test_what_people_write_for_a_repository_is_answered_with_its_uri(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"perhaps you mean {meant}$"):
        parse_uri(text)


@given(st.text(max_size=40), st.sampled_from(["", "hf://", "oci://", "s3://", "pvc://"]))
def test_no_text_does_anything_else_than_parse_or_raise_value_error(text: str, scheme: str) -> None:
    try:
        value = parse_uri(scheme + text)
    except ValueError:
        return
    assert parse_uri(str(value)) == value
    assert ".." not in str(value).split("/")
