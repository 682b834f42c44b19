"""hf:// against a hub on loopback, through the real huggingface_hub."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import time
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Fault, Hub, self_signed
from huggingface_hub import close_session

from lorapool_api.common import FailureReason, FileDigest, artifact_digest
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import base_files_from_folder, inspect_adapter, inspect_base
from lorapool_artifacts.settings import AdapterLimits, FetchLimits, SourceSettings
from lorapool_artifacts.sources.address_guard import AddressGuard
from lorapool_artifacts.sources.http import GuardedSession, translated

LIMITS = AdapterLimits(max_rank=8, max_bytes=1_000_000)


def digest_of(files: dict[str, bytes], names: list[str]) -> str:
    return artifact_digest(
        FileDigest(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in names
    )


async def test_an_adapter_is_checked_from_its_header_without_its_weights(hub: Hub, hf: SourceSettings) -> None:
    weights = zoo.safetensors(zoo.adapter_tensors(rank=4, dtype="F32"))
    hub.repos["acme/base"] = zoo.base_files()
    hub.repos["acme/lora"] = zoo.adapter_files(weights=weights)
    assert (await inspect_base("hf://acme/base", None, hf)).digest is not None
    seen = await inspect_adapter("hf://acme/lora", None, None, zoo.base_facts(), LIMITS, hf)
    assert seen.compatibility.ok, seen.compatibility.message
    assert (seen.rank, seen.target_modules) == (4, ("q_proj", "v_proj"))
    assert seen.revision == hub.commit_of("acme/lora")
    assert seen.digest == digest_of(hub.repos["acme/lora"], ["adapter_config.json", "adapter_model.safetensors"])


async def test_a_large_adapter_is_not_downloaded_to_be_checked(hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files(
        weights=zoo.safetensors({**zoo.adapter_tensors(), "base_model.model.x": ("F32", (500_000,))})
    )
    await inspect_adapter("hf://acme/lora", None, None, None, AdapterLimits(8), hf)
    [(_, _, headers)] = [entry for entry in hub.requests if entry[1].endswith("adapter_model.safetensors")]
    assert headers["range"] == "bytes=0-65535"


async def test_a_fetched_folder_holds_the_listed_files_and_is_named_by_their_digest(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    hub.repos["acme/base"] = files = zoo.base_files()
    resolved = await resolve("hf://acme/base", None, "base", settings=hf)
    assert resolved.digest is None, "small files of the hub carry no sha256"
    path = await fetch(resolved, tmp_path)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert zoo.names_in(path) == names
    assert {name: (path / name).read_bytes() for name in names} == {name: files[name] for name in names}
    assert folder_digest(path) == digest_of(files, names) == (await inspect_base("hf://acme/base", None, hf)).digest
    assert zoo.names_in(tmp_path) == [path.name], "nothing temporary is left"
    assert base_files_from_folder(path).shapes["model.layers.1.mlp.up_proj.weight"] == (zoo.INNER, zoo.HIDDEN)


async def test_a_revision_is_pinned_to_its_commit(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    first = await resolve("hf://acme/lora@main", settings=hf)
    hub.repos["acme/lora"] = zoo.adapter_files(lora_alpha=99)
    with pytest.raises(ArtifactError) as caught:
        await fetch(first, tmp_path)
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_an_adapter_in_a_folder_of_a_repository_is_inspected_and_fetched(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    files = zoo.adapter_files()
    hub.repos["acme/runs"] = {"README.md": b"x", **{f"de/checkpoint-500/{name}": data for name, data in files.items()}}
    for uri in ("hf://acme/runs/de/checkpoint-500", "hf://acme/runs/de/checkpoint-500@main"):
        seen = await inspect_adapter(uri, None, None, None, LIMITS, hf)
        assert seen.compatibility.ok
        path = await fetch(await resolve(uri, settings=hf), tmp_path, seen.digest)
        assert zoo.names_in(path) == ["adapter_config.json", "adapter_model.safetensors"]


async def test_a_repository_with_adapters_in_folders_is_answered_with_the_newest_ones(
    hub: Hub, hf: SourceSettings
) -> None:
    files, trainer = zoo.adapter_files(), {"README.md": b"x", "training_args.bin": b"x", "optimizer.pt": b"x"}
    folders = [f"checkpoint-{step}" for step in range(100, 800, 100)]
    hub.repos["acme/runs"] = trainer | {f"{folder}/{name}": data for folder in folders for name, data in files.items()}
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("hf://acme/runs", None, None, None, LIMITS, hf)
    assert "checkpoint-700, checkpoint-600" in caught.value.message
    assert "and 2 more" in caught.value.message
    assert "such as hf://acme/runs/checkpoint-700" in caught.value.message
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_a_folder_behind_the_revision_is_answered_with_the_right_order(hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/runs"] = {f"a/{name}": data for name, data in zoo.adapter_files().items()}
    with pytest.raises(ArtifactError, match="hf://org/name/folder@main"):
        await inspect_adapter("hf://acme/runs@main/a", None, None, None, LIMITS, hf)


async def test_many_that_fetch_the_same_share_one_download(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    hub.faults = [Fault("adapter_model.safetensors", delay_s=0.2)]
    paths = await asyncio.gather(*(fetch(resolved, tmp_path) for _ in range(20)))
    assert len(set(paths)) == 1
    assert hub.bodies_sent_of("adapter_model.safetensors") == 1


async def test_a_waiter_that_leaves_does_not_stop_the_others(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    hub.faults = [Fault("adapter_model.safetensors", delay_s=0.3)]
    leaver, stayer = (asyncio.create_task(fetch(resolved, tmp_path)) for _ in range(2))
    await asyncio.sleep(0.1)
    leaver.cancel()
    assert (await stayer).is_dir()


async def test_when_all_waiters_leave_the_download_stops_and_leaves_nothing(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    hub.faults = [Fault("adapter_model.safetensors", drip_s=0.02)]
    task = asyncio.create_task(fetch(resolved, tmp_path))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if not zoo.names_in(tmp_path):
            break
        await asyncio.sleep(0.05)
    assert zoo.names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "headers", "reason", "retry_after_s"),
    [
        (404, {}, FailureReason.SOURCE_NOT_FOUND, None),
        (401, {}, FailureReason.UNAUTHORIZED, None),
        (403, {}, FailureReason.UNAUTHORIZED, None),
        (429, {"Retry-After": "17"}, FailureReason.RATE_LIMITED, 17.0),
        (500, {}, FailureReason.SOURCE_UNAVAILABLE, None),
        (503, {"Retry-After": "3"}, FailureReason.SOURCE_UNAVAILABLE, 3.0),
        (504, {}, FailureReason.SOURCE_TIMEOUT, None),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/", "adapter_model.safetensors"])
async def test_each_status_of_the_hub_has_its_reason(
    hub: Hub,
    hf: SourceSettings,
    where: str,
    status: int,
    headers: dict[str, str],
    reason: FailureReason,
    retry_after_s: float | None,
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault(where, status=status, headers=headers)]
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf)
    assert caught.value.reason is reason
    assert caught.value.retry_after_s == retry_after_s


async def test_a_private_repository_needs_the_token_and_the_message_says_where(hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.token = "hf_secretsecret"
    with pytest.raises(ArtifactError, match="HF_TOKEN") as caught:
        await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf)
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    seen = await inspect_adapter(
        "hf://acme/lora", None, None, None, LIMITS, SourceSettings(hf_endpoint=hub.url, hf_token="hf_secretsecret")
    )
    assert seen.compatibility.ok


async def test_a_changed_credential_is_used_without_a_restart(hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/private"], hub.token = zoo.adapter_files(), "new-token"
    (tmp_path / "HF_TOKEN").write_text("old-token\n")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "from-the-environment", "LORAPOOL_CREDENTIALS_DIR": str(tmp_path)}
    settings = SourceSettings.from_env(env)
    with pytest.raises(ArtifactError) as caught:
        await resolve("hf://acme/private", settings=settings)
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    (tmp_path / "HF_TOKEN").write_text("new-token\n")
    assert (await resolve("hf://acme/private", settings=settings)).revision == hub.commit_of("acme/private")


async def test_settings_show_no_secret() -> None:
    env = {
        "HF_TOKEN": "s3cr3t",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "LORAPOOL_OCI_PASSWORD": "s3cr3t",
        "HF_ENDPOINT": "http://hub/",
    }
    settings = SourceSettings.from_env(env)
    assert settings.hf_endpoint == "http://hub"
    assert "s3cr3t" not in repr(settings)


async def test_an_unreachable_hub_is_transient() -> None:
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter(
            "hf://acme/lora", None, None, None, LIMITS, SourceSettings(hf_endpoint="http://127.0.0.1:9")
        )
    assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "host name is not found (DNS)"),
        (ConnectionRefusedError(111, "Connection refused"), "connection is refused"),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "artifacts.caBundle"),
        (ConnectionResetError(104, "Connection reset by peer"), "ConnectionError"),
    ],
)
def test_the_message_says_whether_dns_the_port_or_tls_is_wrong(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 443))])
    monkeypatch.setattr("urllib3.util.connection.create_connection", refuse)
    deadline = Deadline(FetchLimits(), where="oci://registry.example/a")
    session = GuardedSession(AddressGuard("oci://registry.example/a"), deadline)
    with pytest.raises(ArtifactError) as caught, translated(deadline):
        session.get("https://registry.example/v2/")
    session.close()
    assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE
    assert said in caught.value.message


async def test_a_refused_connection_of_the_hub_is_named() -> None:
    with pytest.raises(ArtifactError, match="connection is refused"):
        await inspect_adapter(
            "hf://acme/lora", None, None, None, LIMITS, SourceSettings(hf_endpoint="http://127.0.0.1:9")
        )


async def test_a_proxy_is_used_and_resolves_the_hosts_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("NO_PROXY", "registry.example")
    close_session()  # huggingface_hub keeps one client per process, which has read the variables
    hub.repos["acme/lora"] = zoo.adapter_files()
    behind = SourceSettings(hf_endpoint="http://hub.invalid")
    path = await fetch(await resolve("hf://acme/lora", settings=behind), tmp_path)
    close_session()
    assert (path / "adapter_model.safetensors").exists()


async def test_an_authority_is_trusted_that_the_charts_variables_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    with Hub(certificate) as hub:
        hub.repos["acme/lora"] = zoo.adapter_files()
        hf = SourceSettings(hf_endpoint=hub.url)
        close_session()
        with pytest.raises(ArtifactError, match=r"artifacts\.caBundle") as caught:
            await resolve("hf://acme/lora", settings=hf)
        assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(name, str(certificate))
        close_session()
        path = await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path)
        close_session()
    assert (path / "adapter_model.safetensors").exists()


async def test_hosts_in_no_proxy_are_reached_directly(
    hub: Hub, hf: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.repos["acme/lora"] = zoo.adapter_files()
    found = await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf)
    assert found.compatibility.ok


@pytest.mark.parametrize("where", ["/api/models/", "adapter_model.safetensors"])
async def test_a_hub_that_hangs_is_given_up_after_the_idle_time(
    hub: Hub, hf: SourceSettings, quick: FetchLimits, where: str
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault(where, delay_s=1.5)]
    began = time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf, fetch_limits=quick)
    assert caught.value.reason is FailureReason.SOURCE_TIMEOUT
    assert time.monotonic() - began < 1.4


async def test_a_hub_that_drips_is_given_up_after_the_total_time(
    hub: Hub, hf: SourceSettings, quick: FetchLimits, tmp_path: Path
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", None, "adapter", quick, hf)
    hub.faults = [Fault("adapter_model.safetensors", drip_s=0.05)]
    began = time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        await fetch(resolved, tmp_path)
    assert caught.value.reason is FailureReason.SOURCE_TIMEOUT
    assert time.monotonic() - began < 3


async def test_a_slow_source_does_not_slow_another_one(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/slow"] = hub.repos["acme/fast"] = zoo.adapter_files()
    hub.repos["acme/slow"] = zoo.adapter_files(lora_alpha=1)
    hub.faults = [Fault("acme/slow/resolve", delay_s=1.0)]
    slow = [
        asyncio.create_task(fetch(await resolve("hf://acme/slow", settings=hf), tmp_path / str(index)))
        for index in range(8)
    ]
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await fetch(await resolve("hf://acme/fast", settings=hf), tmp_path)
    assert time.monotonic() - began < 0.8
    await asyncio.gather(*slow)


async def test_a_download_that_breaks_off_is_resumed_where_it_stopped(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    hub.repos["acme/lora"] = files = zoo.adapter_files()
    hub.faults = [Fault("adapter_model.safetensors", break_after=100, times=2)]
    path = await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path)
    assert (path / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    ranges = [entry[2].get("range") for entry in hub.requests if entry[1].endswith("adapter_model.safetensors")]
    assert ranges == [None, "bytes=100-", "bytes=200-"]


async def test_a_source_that_always_breaks_off_is_unavailable(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault("adapter_model.safetensors", break_after=10)]
    with pytest.raises(ArtifactError) as caught:
        await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path)
    assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE
    assert zoo.names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body[:-7], "shorter"),
        (lambda body: body + b"!", "longer"),
        (lambda body: body[:-1] + b"\x7f", "another hash"),
    ],
)
async def test_content_other_than_listed_is_corrupt_and_leaves_nothing(
    hub: Hub, hf: SourceSettings, tmp_path: Path, change: object, words: str
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault("adapter_model.safetensors", change=change)]  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=words) as caught:
        await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path)
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT
    assert zoo.names_in(tmp_path) == []


async def test_another_digest_than_the_object_pins_is_a_mismatch(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    other = f"sha256:{'0' * 64}"
    with pytest.raises(ArtifactError) as caught:
        await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path, other)
    assert caught.value.reason is FailureReason.DIGEST_MISMATCH
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("hf://acme/lora", None, other, None, LIMITS, hf)
    assert caught.value.reason is FailureReason.DIGEST_MISMATCH


async def test_what_is_too_large_by_the_listing_is_never_requested(hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("hf://acme/lora", None, None, None, AdapterLimits(8, max_bytes=500), hf)
    assert caught.value.reason is FailureReason.TOO_LARGE
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


async def test_a_redirect_to_a_metadata_address_is_refused(hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    for target in ("http://169.254.169.254/latest", "http://[::ffff:169.254.169.254]/", "http://0.0.0.0:1/"):
        hub.faults = [Fault("adapter_config.json", status=302, headers={"Location": target})]
        with pytest.raises(ArtifactError) as caught:
            await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf)
        assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_redirect_to_another_host_loses_the_token(hub: Hub) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    cdn = hub.url.replace("127.0.0.1", "localhost")
    path = f"/acme/lora/resolve/{hub.commit_of('acme/lora')}/adapter_config.json"
    hub.faults = [Fault("adapter_config.json", status=302, headers={"Location": f"{cdn}{path}"}, times=1)]
    settings = SourceSettings(
        hf_endpoint=hub.url, hf_token="hf_secretsecret", oci_insecure_hosts=frozenset({"localhost"})
    )
    seen = await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, settings)
    assert seen.compatibility.ok
    first, second = [entry[2] for entry in hub.requests if entry[1].endswith("adapter_config.json")]
    assert first["authorization"] == "Bearer hf_secretsecret"
    assert "authorization" not in second


@pytest.mark.parametrize(
    ("files", "reason", "words"),
    [
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"},
            FailureReason.UNSUPPORTED_FORMAT,
            "safe_serialization=True",
        ),
        ({"adapter_config.json": b"{}", "weights.pkl": b"\x80\x04"}, FailureReason.UNSUPPORTED_FORMAT, "pickle"),
        ({"adapter.tar.gz": b"x"}, FailureReason.UNSUPPORTED_FORMAT, "archive"),
        ({"adapter_model.safetensors": b"x" * 2000}, FailureReason.UNSUPPORTED_FORMAT, "adapter_config.json"),
        ({"model.safetensors": b"x", "config.json": b"{}"}, FailureReason.UNSUPPORTED_FORMAT, "whole model"),
        ({"README.md": b"x"}, FailureReason.SOURCE_NOT_FOUND, "adapter_model.safetensors"),
        (zoo.adapter_files(auto_map={"AutoModel": "evil.Model"}), FailureReason.UNSUPPORTED_FORMAT, "auto_map"),
    ],
)
async def test_what_is_no_safe_adapter_is_refused_by_name(
    hub: Hub, hf: SourceSettings, files: dict[str, bytes], reason: FailureReason, words: str
) -> None:
    hub.repos["acme/lora"] = files
    with pytest.raises(ArtifactError, match=words) as caught:
        await inspect_adapter("hf://acme/lora", None, None, None, LIMITS, hf)
    assert caught.value.reason is reason
    assert not any(path.endswith((".bin", ".pkl", ".gz", ".py")) for _, path, _ in hub.requests)


async def test_a_base_with_code_of_its_own_is_refused(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/base"] = zoo.base_files(auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    with pytest.raises(ArtifactError, match="auto_map"):
        await inspect_base("hf://acme/base", None, hf)
    with pytest.raises(ArtifactError, match="auto_map"):
        await fetch(await resolve("hf://acme/base", None, "base", settings=hf), tmp_path)
    assert zoo.names_in(tmp_path) == []
    hub.repos["acme/base"] = {
        **zoo.base_files(),
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}',
    }
    with pytest.raises(ArtifactError, match="auto_map"):
        await fetch(await resolve("hf://acme/base", None, "base", settings=hf), tmp_path)


async def test_a_sharded_base_is_read_from_all_its_headers(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/base"] = zoo.sharded_base_files()
    seen = await inspect_base("hf://acme/base", None, hf)
    assert sum(len(shape) == 2 for shape in seen.files.shapes.values()) == len(zoo.MODULES) * zoo.LAYERS + 2
    assert {"acme/base", "tiny/llama"} == seen.files.names
    path = await fetch(await resolve("hf://acme/base", None, "base", settings=hf), tmp_path)
    assert folder_digest(path) == seen.digest
    del hub.repos["acme/base"]["model-00002-of-00002.safetensors"]
    with pytest.raises(ArtifactError) as caught:
        await inspect_base("hf://acme/base", None, hf)
    assert caught.value.reason is FailureReason.CORRUPT_ARTIFACT


async def test_a_pickle_next_to_the_safetensors_is_neither_fetched_nor_loaded(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    bomb = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    hub.repos["acme/lora"] = {**zoo.adapter_files(), "adapter_model.bin": bomb, "setup.py": b"raise SystemExit"}
    path = await fetch(await resolve("hf://acme/lora", settings=hf), tmp_path / "cache")
    assert zoo.names_in(path) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any(asked.endswith((".bin", ".py")) for _, asked, _ in hub.requests)
    assert zoo.names_in(tmp_path) == ["cache"], "the canary never ran"
