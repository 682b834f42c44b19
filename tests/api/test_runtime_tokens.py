"""Master tokens from a file, and the bearer tokens that are derived from them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from lorapool_api.protocol import runtime_token
from lorapool_api.settings import SettingsError
from lorapool_api.trust.runtime_tokens import RECHECK_S, RuntimeTokens, read_master_tokens

OLD, NEW = "o" * 64, "n" * 64


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def replace(path: Path, text: str) -> None:
    """As the kubelet changes a file of a Secret: another file takes its name."""
    other = path.with_suffix(".new")
    other.write_text(text)
    os.replace(other, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{OLD}\n")
    return file


def test_a_short_or_missing_master_token_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_master_tokens(path)
    for text in ("", "short-secret\n", f"{NEW}\nshort-secret\n", f"{NEW}\n{OLD}\n{'short-secret' * 4}"):
        path.write_text(text)
        with pytest.raises(SettingsError) as caught:
            read_master_tokens(path)
        assert "short-secret" not in str(caught.value)


def test_a_rotation_has_the_current_token_first_and_then_the_previous(path: Path) -> None:
    clock = Clock()
    tokens = RuntimeTokens(read_master_tokens(path), path, clock=clock)
    assert tokens.of("u") == (runtime_token(OLD, "u"),)
    replace(path, f"{NEW}\n{OLD}\n")
    assert tokens.of("u") == (runtime_token(OLD, "u"),), "the file is not read for each request"
    clock.now_s += RECHECK_S
    assert tokens.of("u") == (runtime_token(NEW, "u"), runtime_token(OLD, "u"))
    replace(path, f"{NEW}\n")
    clock.now_s += RECHECK_S
    assert tokens.of("u") == (runtime_token(NEW, "u"),)


def test_a_changed_file_that_cannot_be_used_leaves_the_old_token_in_force_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tokens = RuntimeTokens(read_master_tokens(path), path, clock=clock)
    with caplog.at_level(logging.ERROR):
        replace(path, "too-short")
        for _ in range(3):
            clock.now_s += RECHECK_S
            assert tokens.of("u") == (runtime_token(OLD, "u"),)
    assert len(caplog.records) == 1
    assert "too-short" not in str(caplog.records[0].__dict__)
