"""Two tokens are valid while one replaces the other: the file of hashes is read again when it changes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import FakeClock, descriptor, key_of, serving, settings_for_tests

from lorapool_api.protocol import token_sha256
from lorapool_api.settings import SettingsError
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge, ProofError
from lorapool_runtime.__main__ import main
from lorapool_runtime.serving.tokens import CHECK_INTERVAL_S, BearerTokens
from lorapool_runtime.settings import read_settings

OLD, NEW = "old" * 20, "new" * 20


def write(file: Path, *tokens: str) -> None:
    """Replaces the file as a mounted Secret does: a new file under the same name."""
    fresh = file.with_name("fresh")
    fresh.write_text("".join(f"{token_sha256(token)}\n" for token in tokens))
    fresh.rename(file)


def tokens_of(file: Path, clock: FakeClock) -> BearerTokens:
    return BearerTokens(settings_for_tests(token_sha256_file=file), clock.clock())


def accepted(tokens: BearerTokens) -> tuple[bool, bool]:
    return tokens.accepts(f"Bearer {OLD}"), tokens.accepts(f"bearer {NEW}")


def test_a_token_is_replaced_without_a_moment_in_which_none_is_valid(tmp_path: Path) -> None:
    file, clock = tmp_path / "hashes", FakeClock()
    write(file, OLD)
    tokens = tokens_of(file, clock)
    assert accepted(tokens) == (True, False)
    write(file, OLD, NEW)
    assert accepted(tokens) == (True, True)  # a refused token is looked up at once
    write(file, NEW)
    clock.pass_s(CHECK_INTERVAL_S)
    assert accepted(tokens) == (False, True)


def test_a_file_that_breaks_keeps_the_last_valid_tokens_and_logs_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "hashes", FakeClock()
    write(file, OLD)
    tokens = tokens_of(file, clock)
    for broken in ("", "not a hash\n", OLD, "A" * 64, None):
        caplog.clear()
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
            os.utime(file, ns=(len(broken), len(broken)))
        for _ in range(3):
            clock.pass_s(CHECK_INTERVAL_S)
            assert accepted(tokens) == (True, False)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert OLD not in caplog.text
    write(file, NEW)
    clock.pass_s(CHECK_INTERVAL_S)
    assert accepted(tokens) == (False, True)


async def test_a_runtime_serves_both_tokens_while_they_are_replaced(byte_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "hashes"
    write(file, OLD)

    async def status(url: str, token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(url) as session, session.get("/v1/models", headers=headers) as response:
            return response.status

    async with serving(byte_tokenizer, token_sha256_file=file) as served:
        assert [await status(served.url, token) for token in (OLD, NEW, "")] == [200, 401, 401]
        write(file, NEW, OLD)
        assert [await status(served.url, token) for token in (OLD, NEW, "")] == [200, 200, 401]


def test_a_file_that_is_missing_or_wrong_at_the_start_is_an_invalid_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, "LORAPOOL_TOKEN_SHA256_FILE": str(tmp_path / "hashes")})
    for content, words in ((None, "cannot be read: No such file"), ("xyz", "one token per line")):
        if content is not None:
            (tmp_path / "hashes").write_text(content)
        assert main(["--model", "x"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("environ", [{}, {"LORAPOOL_TOKEN_SHA256": "a" * 64}])
def test_with_a_file_of_hashes_all_addresses_are_served_and_a_second_setting_is_refused(environ: Any) -> None:
    environ = {"LORAPOOL_TOKEN_SHA256_FILE": "/run/hashes", **environ}
    if len(environ) == 1:
        assert read_settings(["--model", "x"], environ).host == "0.0.0.0"
        return
    with pytest.raises(SettingsError, match="set only one of them"):
        read_settings(["--model", "x"], environ)


async def polled(url: str, challenge: Challenge, path: str = "/v1/runtime") -> tuple[int, str | None, bytes]:
    headers = {"Authorization": challenge.authorization}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url + path) as response:
        return response.status, response.headers.get(HEADER_PROOF), await response.read()


async def test_refused_and_administrative_calls_have_an_audit_line_without_the_token(
    byte_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/v1/adapters/{key_of('a').uid}/{key_of('a').digest}"
    body = descriptor("a").model_dump_json(by_alias=True)
    caplog.set_level(logging.ERROR)
    caplog.handler.setLevel(logging.INFO)  # the audit logger has a level of its own
    async with serving(byte_tokenizer, token_sha256=token_sha256(NEW)) as served, aiohttp.ClientSession() as session:
        for token, method in ((OLD, "PUT"), (NEW, "PUT"), (NEW, "DELETE")):
            headers = {"Authorization": f"Bearer {token}"}
            async with session.request(method, served.url + path, data=body, headers=headers) as response:
                await response.read()
    lines = [record for record in caplog.records if record.name == "lorapool.audit"]
    assert [line.getMessage() for line in lines] == ["request refused", "adapter registered", "adapter removed"]
    assert all(line.__dict__["remote"] == "127.0.0.1" for line in lines)
    assert not any(token in str(line.__dict__) for line in lines for token in (OLD, NEW))


async def test_a_poll_without_the_token_is_answered_with_a_proof_of_this_pod_and_this_answer(
    byte_tokenizer: Path,
) -> None:
    known, foreign = token_sha256(NEW), token_sha256(OLD)
    async with serving(byte_tokenizer, token_sha256=known, pod_uid="this-pod") as served:
        challenge = Challenge.new(known, "this-pod")
        status, proof, body = await polled(served.url, challenge)
        assert status == 200
        challenge.check(known, proof, body)
        for wrong in (
            lambda: challenge.check(known, proof, body + b" "),
            lambda: challenge.check(known, None, body),
            lambda: challenge.check(foreign, proof, body),
            lambda: Challenge.new(known, "this-pod").check(known, proof, body),  # a recorded answer
            lambda: challenge._replace(pod_uid="other-pod").check(known, proof, body),  # relayed for another pod
        ):
            with pytest.raises(ProofError):
                wrong()


async def test_a_poll_of_another_pod_or_by_a_stranger_or_of_another_route_is_refused(byte_tokenizer: Path) -> None:
    known = token_sha256(NEW)
    async with serving(byte_tokenizer, token_sha256=known, pod_uid="this-pod") as served:
        for challenge, path in (
            (Challenge.new(known, "other-pod"), "/v1/runtime"),
            (Challenge.new(token_sha256(OLD), "this-pod"), "/v1/runtime"),
            (Challenge.new(known, "this-pod")._replace(nonce="0" * 32), "/v1/runtime"),
            (Challenge.new(known, "this-pod"), "/v1/models"),
        ):
            assert (await polled(served.url, challenge, path))[:2] == (401, None)
    async with serving(byte_tokenizer, token_sha256=known) as served:  # a runtime that knows no pod proves none
        assert (await polled(served.url, Challenge.new(known, "this-pod")))[:2] == (401, None)
