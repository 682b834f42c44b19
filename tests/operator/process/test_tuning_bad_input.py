"""Data sets that can never be trained on: a real store and a real API server, and what the API shows of each job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes_operator import FakeInspector
from operator_world import Api, running_operator, until
from store_kit import MASTER, StoreProcess, running_store

from lorapool_api.store_protocol import StoreGrant
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_artifacts.datasets.lines import MAX_LINE_BYTES
from lorapool_artifacts.sources.store_client import StoreClient
from lorapool_gateway.tuning.job_object import parse_object, shown
from lorapool_operator.effects.job_files import StoreFiles
from lorapool_operator.effects.store_grants import StoreGrants

pytestmark = pytest.mark.apiserver

USER = {"role": "user", "content": "Good morning."}
ANSWER = {"role": "assistant", "content": "Guten Morgen."}


def chat(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


GOOD = chat(USER, ANSWER)
COMPLETION = b'{"prompt": "Good morning. ->", "completion": " Guten Morgen."}'


class Row(NamedTuple):
    """The third line of an otherwise good file, or a whole file, and what is wrong with it."""

    content: bytes
    said: str
    line: int | None = 3
    code: str = "invalid_training_file"
    whole: bool = False

    @property
    def file(self) -> bytes:
        return self.content if self.whole else b"\n".join([GOOD, GOOD, self.content, *[GOOD] * 9])


ROWS = {
    "empty": Row(b"", "empty; at least 10", None, "invalid_n_examples", whole=True),
    "nine": Row(b"\n".join([GOOD] * 9), "9 examples; at least 10", None, "invalid_n_examples", whole=True),
    "no-json": Row(b"hello", "Line 3 is not valid JSON"),
    "array": Row(b"[1]", "an array, not a JSON object"),
    "cut": Row(b'{"messages": [{"role": "us', "cut off"),
    "not-utf8": Row(b'{"messages": "\xff"}', "not UTF-8"),
    "nul": Row(b'{"messages": "\0"}', "NUL byte"),
    "too-long": Row(b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than"),
    "no-messages": Row(b"{}", "Example 3: it has no `messages`"),
    "no-role": Row(chat(USER, {"content": "x"}), "Example 3, message 2: it has no `role`"),
    "unknown-role": Row(chat(USER, {**ANSWER, "role": "bot"}), "Example 3, message 2: it has the unknown role"),
    "null-content": Row(chat(USER, {**ANSWER, "content": None}), "Example 3, message 2: `content` is missing or null"),
    "no-answer": Row(chat(USER), "Example 3: it has no message of the assistant"),
    "all-0": Row(chat(USER, {**ANSWER, "weight": 0}), "all messages of the assistant have weight 0"),
    "weight-half": Row(chat(USER, {**ANSWER, "weight": 0.5}), "Example 3, message 2: `weight` is 0.5"),
    "weight-text": Row(chat(USER, {**ANSWER, "weight": "1"}), 'Example 3, message 2: `weight` is "1"'),
    "weight-of-user": Row(chat({**USER, "weight": 1}, ANSWER), "Example 3, message 1: `weight` is not a key"),
    "unknown-key": Row(chat(USER, {**ANSWER, "colour": "red"}), 'Example 3, message 2: the key "colour" is unknown'),
    "mixed": Row(COMPLETION, "a chat example is expected as in the lines before"),
    "preference": Row(b'{"preferred_output": [], "non_preferred_output": []}', "preference pair"),
}
ACCEPTED = b"\xef\xbb\xbf" + b"\r\n".join([GOOD] * 10) + b"\r\n\r\n"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    with running_store(tmp_path / "store") as made:
        yield made


async def ended(api: Api, name: str) -> bool:
    return ((await api.get("finetunejobs", name)).get("status") or {}).get("state") == "Failed"


async def test_each_bad_file_fails_with_its_code_and_line_and_without_a_pod(
    api: Api, tmp_path: Path, store: StoreProcess
) -> None:
    grants = StoreGrants(store.url, MasterTokens((MASTER,)))
    client = StoreClient(grants.access(StoreGrant(write=("",))))
    await api.base(fineTuning={"enabled": True})
    for name, row in ROWS.items():
        client.put(api.namespace, f"files/{name}", row.file)
        uri = f"store://{api.namespace}/files/{name}"
        await api.tuning(name, data={"training": {"uri": uri}, "validationFraction": "0.1"})
    files = StoreFiles(grants)
    async with running_operator(api, tmp_path, FakeInspector(), job_files=files, tuning=True) as _:
        for name, row in ROWS.items():
            await until(lambda name=name: ended(api, name))
            raw = await api.get("finetunejobs", name)
            seen = shown(parse_object(raw), [])
            assert (seen["status"], seen["error"]["code"], seen["error"]["param"]) == (
                "failed",
                row.code,
                "training_file",
            ), name
            assert row.said in seen["error"]["message"], name
            assert raw["status"]["failure"].get("line") == row.line, name
        assert await api.find("jobs", "tiny-trainer") is None
        client.put(api.namespace, "files/accepted", ACCEPTED)
        uri = f"store://{api.namespace}/files/accepted"
        await api.tuning("accepted", data={"training": {"uri": uri}, "validationFraction": "0.1"})
        await until(lambda: api.find("jobs", "tiny-trainer"))
    client.close()
