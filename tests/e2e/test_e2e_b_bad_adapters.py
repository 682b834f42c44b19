"""Adapters that cannot be served are refused with a reason within a second, without effect on others."""

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_world import BASE, ROOT, World
from openai import APIStatusError

GOOD = ROOT / "examples" / "finetunes" / "routing"


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _other_base(folder: Path) -> None:
    _rewrite(folder, lambda name, shape: [shape[0], 4096] if "lora_A" in name else [4096, shape[1]])
    path = folder / "adapter_config.json"
    other = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))


def _not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\xc0\x7f"  # bf16 NaN
    path.write_bytes(raw)


def _rewrite(folder: Path, shape: Callable[[str, list[int]], list[int]]) -> None:
    """The same tensor names with other shapes, filled with zeros."""
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    new, at = {}, 0
    for name in sorted(header):
        dims = shape(name, header[name]["shape"])
        size = 2 * dims[0] * dims[1]
        new[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(new).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


# One that the file names tell, one that the header tells, one that only the load finds; the others: tests/artifacts.
ZOO: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "pickle-only": (_pickle_only, {"UnsupportedFormat"}),
    "other-base": (_other_base, {"WrongBase", "Incompatible"}),
    "not-finite": (_not_finite, {"NonFiniteWeights"}),
}


def push(world: World, folder: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pushes the folder unchecked (the project's own tool would refuse it); returns the oci:// URI for pods."""
    spec = importlib.util.spec_from_file_location("lorapool_push", ROOT / "hack" / "models" / "push.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "artifact", lambda where: (tool.ADAPTER_TYPE, sorted(where.iterdir())))
    digest = tool.push(folder, f"{world.summary['registry']}/{repository}:1", insecure=True)
    return f"oci://{world.summary['artifact_registry']}/{repository}@{digest}"


def manifest(world: World, name: str, uri: str, **spec: object) -> dict[str, object]:
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "LoraAdapter",
        "metadata": {"name": name, "namespace": world.namespace},
        "spec": {"baseModelRef": {"name": "smollm2"}, "source": {"uri": uri}, **spec},
    }


@pytest.mark.parametrize("kind", ZOO)
def test_a_bad_adapter_ends_in_a_typed_failure_and_affects_no_other_adapter(
    world: World, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, reasons = ZOO[kind]
    folder = tmp_path / kind
    shutil.copytree(GOOD, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.md"))
    spoil(folder)
    world.apply(manifest(world, f"bad-{kind}", push(world, folder, f"bad/{kind}", monkeypatch)))
    try:
        if kind != "not-finite":  # values are not in the header: only the load reads them
            world.wait(
                "a failure",
                lambda: _failed(world, f"bad-{kind}") in reasons or _failed(world, f"bad-{kind}"),
                timeout_s=30,
            )
        known = f"bad-{kind}"  # the gateways learn of it by their own watches
        world.wait("a gateway's refusal", lambda: _refused(world, known).status_code != 404, timeout_s=30)
        error = _refused(world, f"bad-{kind}")
        assert error.status_code == 422
        assert error.body["code"] in {_snake(reason) for reason in reasons}  # type: ignore[index]
        assert len(error.body["message"]) > 40  # type: ignore[index]
        world.wait("the failure in status", lambda: _failed(world, f"bad-{kind}") in reasons, timeout_s=30)
        failure = world.get("lora", f"bad-{kind}")["status"]["failure"]
        assert "retryAt" not in failure
        took_ms = int(_refused(world, f"bad-{kind}").response.headers["openai-processing-ms"])
        assert took_ms < 1000, "a known failure is answered at once, not held"
        assert world.chat("routing") == (world.answer("routing"), world.header("routing"))
    finally:
        world.kubectl("delete", "lora", f"bad-{kind}")


def _failed(world: World, name: str) -> str:
    return str((world.get("lora", name).get("status", {}).get("failure") or {}).get("reason", ""))


def _snake(reason: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(reason))


def _refused(world: World, name: str) -> APIStatusError:
    with world.client() as client, pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(**{**world.question("routing"), "model": world.model(name)})
    return caught.value


def test_a_source_that_is_not_there_is_refused_at_once_and_looked_for_again(world: World) -> None:
    uri = f"oci://{world.summary['artifact_registry']}/adapters/nowhere:1"
    world.apply(manifest(world, "bad-nowhere", uri))
    try:
        world.wait("a failure", lambda: _failed(world, "bad-nowhere") == "SourceNotFound", timeout_s=30)
        assert world.get("lora", "bad-nowhere")["status"]["failure"]["retryAt"]
        assert _refused(world, "bad-nowhere").status_code == 422
    finally:
        world.kubectl("delete", "lora", "bad-nowhere")


def test_a_source_inside_the_private_network_is_refused_whether_or_not_something_is_there(world: World) -> None:
    uris = ("oci://127.0.0.1:9/a/b:1", "oci://kubernetes.default.svc/a/b:1", "oci://169.254.169.254/a/b:1")
    for number, uri in enumerate(uris):
        world.apply(manifest(world, f"bad-inner-{number}", uri))
    try:
        for number in range(len(uris)):
            name = f"bad-inner-{number}"
            world.wait("a refusal", lambda name=name: _failed(world, name) == "InvalidSource", timeout_s=60)
    finally:
        for number in range(len(uris)):
            world.kubectl("delete", "lora", f"bad-inner-{number}")


def test_a_source_that_is_down_is_tried_again_and_requests_get_503(world: World) -> None:
    uri = "oci://registry.invalid/adapters/down:1"  # a name that is never found
    world.patch("bm", BASE, {"coldStart": {"maxWait": "5s", "maxQueued": 256}})
    world.apply(manifest(world, "bad-down", uri))
    try:
        world.wait("a transient failure", lambda: _failed(world, "bad-down") == "SourceUnavailable", timeout_s=60)
        assert world.get("lora", "bad-down")["status"]["failure"]["retryAt"]
        error = _refused(world, "bad-down")
        assert error.status_code == 503
        assert int(error.response.headers["retry-after"]) >= 1
    finally:
        world.patch("bm", BASE, {"coldStart": {"maxWait": "5m", "maxQueued": 256}})
        world.kubectl("delete", "lora", "bad-down")


def test_an_adapter_whose_base_is_missing_says_so(world: World) -> None:
    lonely = manifest(world, "lonely", f"oci://{world.summary['artifact_registry']}/adapters/routing:1")
    lonely["spec"]["baseModelRef"] = {"name": "absent"}  # type: ignore[index]
    world.apply(lonely)
    try:
        world.wait(
            "BaseNotFound",
            lambda: world.condition("lora", "lonely", "Ready") == ("False", "BaseNotFound"),
            timeout_s=30,
        )
        assert _refused(world, "lonely").status_code == 503
    finally:
        world.kubectl("delete", "lora", "lonely")
