"""The `inspect` command makes the operator's check from a shell."""

from __future__ import annotations

import json
from pathlib import Path

import artifact_zoo as zoo
import pytest

from lorapool_artifacts.__main__ import main


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("adapter", "status", "reason"),
    [
        (zoo.adapter_files(), 0, None),
        (zoo.adapter_files(tensors=zoo.adapter_tensors(layers=range(3))), 1, "WrongBase"),
        ({"adapter_model.bin": b"x"}, 2, "UnsupportedFormat"),
    ],
)
def test_the_command_says_whether_an_adapter_fits_and_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: dict[str, bytes], status: int, reason: str | None
) -> None:
    write(tmp_path / "models" / "lora", adapter)
    write(tmp_path / "models" / "base", zoo.base_files())
    arguments = ["inspect", "pvc://models/lora", "--base", "pvc://models/base", "--pvc-root", str(tmp_path)]
    assert main(arguments) == status
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["reason"]) == (status == 0, reason)
