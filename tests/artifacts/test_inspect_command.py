"""`lorapool inspect` makes the checks of operator and runtime from a shell."""

from __future__ import annotations

import json
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Hub
from fakes_runtime import save_byte_tokenizer

from lorapool_api.basemodel import BaseLora
from lorapool_artifacts.inspect_command import read_options
from lorapool_cli.__main__ import main
from lorapool_runtime.settings import RuntimeSettings

WORSE = zoo.adapter_files(tensors=zoo.adapter_tensors(layers=range(3)), use_dora=True, bias="all")


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return write(tmp_path / "models" / "base", zoo.base_files())


@pytest.mark.parametrize(
    ("adapter", "status", "reasons"),
    [
        (zoo.adapter_files(), 0, []),
        (zoo.adapter_files(tensors=zoo.adapter_tensors(layers=range(3))), 1, ["WrongBase"]),
        ({"adapter_model.bin": b"x"}, 1, ["UnsupportedFormat"]),
        (WORSE, 1, ["Incompatible", "Incompatible", "WrongBase"]),
        ({"adapter_model.safetensors": b"x", "adapter_config.json": b"x"}, 1, ["CorruptArtifact", "CorruptArtifact"]),
        ({"README.md": b"x"}, 2, ["SourceNotFound"]),
    ],
)
def test_the_exit_status_tells_accepted_refused_and_not_checked_and_all_findings_are_reported(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str], adapter: dict[str, bytes], status: int,
    reasons: list[str],
) -> None:  # fmt: skip
    folder = write(tmp_path / "models" / "lora", adapter)
    volume = ["--pvc-root", str(tmp_path)]
    for source, more in ((folder, []), ("pvc://models/lora", volume)):
        assert main(["inspect", source, "--base", base, "--json", *more]) == status
        answer = json.loads(capsys.readouterr().out)
        assert answer["ok"] is (status == 0)
        assert [finding["reason"] for finding in answer["findings"]] == reasons
        assert (answer["digest"] is not None) is (status == 0)


def test_people_get_a_table_with_each_finding_and_its_remedy(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", write(tmp_path / "lora", WORSE), "--base", base])
    printed = capsys.readouterr().out
    for words in ("rank      4 of at most 16", "modules   q_proj, v_proj", "result    refused, for 3 causes"):
        assert words in printed
    assert [line for line in printed.splitlines() if len(line) > 120 and "/" not in line] == []
    assert " 1. Incompatible\n    adapter_config.json: bias='all' trains biases" in printed
    assert " 3. WrongBase\n" in printed


def test_a_base_that_cannot_be_read_is_not_the_adapters_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "lora", zoo.adapter_files())
    assert main(["inspect", folder, "--base", str(tmp_path / "nowhere")]) == 2
    assert "The base: " in capsys.readouterr().out


@pytest.mark.parametrize("source", ["org/name", "./nowhere", "hf://org"])
def test_what_is_no_source_is_answered_with_what_to_write(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source]) == 2
    printed = capsys.readouterr().out
    assert "hf://org" in printed or "does not exist; check the path" in printed


def test_a_repository_is_inspected_with_the_endpoint_of_the_environment(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.repos["acme/runs"] = {f"a/{name}": data for name, data in zoo.adapter_files().items()}
    assert main(["inspect", "hf://acme/runs/a"]) == 0
    assert main(["inspect", "hf://acme/runs"]) == 2
    assert "hf://acme/runs/a" in capsys.readouterr().out


def test_a_link_of_a_local_hub_cache_is_followed(tmp_path: Path) -> None:
    blobs = write(tmp_path / "blobs", zoo.adapter_files())
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").symlink_to("../../blobs/adapter_config.json")
    (snapshot / "adapter_model.safetensors").symlink_to(f"{blobs}/adapter_model.safetensors")
    assert main(["inspect", str(snapshot)]) == 0


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON; save it again, or remove the file"),
        ("chat_template.jinja", "{% if %}", "Correct it, or set spec.chatTemplate"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<new>", "added_tokens_decoder": {"900": {"content": "<new>"}}}',
            f"for which the base has no row: its embedding has {zoo.VOCAB} rows",
        ),
    ],
)
def test_what_an_adapter_brings_for_chats_is_checked_against_the_base(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str], file: str, content: str, words: str
) -> None:
    save_byte_tokenizer(Path(base))
    folder = Path(write(tmp_path / "lora", zoo.adapter_files()))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["inspect", str(folder), "--base", base]) == 0
    (folder / file).write_text(content)
    capsys.readouterr()
    assert main(["inspect", str(folder), "--base", base, "--json"]) == 1
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    assert words in finding["message"]


def test_the_defaults_are_those_of_a_base_and_its_runtime() -> None:
    rank = read_options(["x"]).limits.max_rank
    assert rank == BaseLora().max_rank == RuntimeSettings.model_fields["max_rank"].default
