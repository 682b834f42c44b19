"""What an adapter brings besides its matrices, template, tokenizer and ends, and what objects say instead."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import (
    EOS,
    VOCAB,
    FakeEngine,
    FakeStore,
    Served,
    descriptor,
    formats_of,
    key_of,
    save_byte_tokenizer,
    serving,
    tokenizer_of,
    until,
)
from transformers import AutoTokenizer

from lorapool_api.chat import ChatTemplate, Generation, TemplateOrigin, TemplateUse
from lorapool_api.common import FailureReason
from lorapool_api.protocol import AdapterReport, AdapterState
from lorapool_artifacts.errors import ArtifactError
from lorapool_runtime.openai.chats.chat_files import read_chat_files
from lorapool_runtime.openai.chats.chat_formats import ChatFormats

HI: list[Any] = [{"role": "user", "content": "hi"}]
START, PAD = 256, 258
OWN = "{% for m in messages %}OWN {{ m.content }} {% endfor %}{% if add_generation_prompt %}GO{% endif %}"
BASE_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def write(folder: Path, **files: Any) -> Path:
    """A folder with these files; a name's `_json` or `_jinja` is its ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
async def served(byte_tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(byte_tokenizer, engine=FakeEngine(reply=lambda *_: "said"), store=FakeStore()) as running:
        yield running


class Counting:
    """Calls a function, and counts."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.calls = run, 0

    def __call__(self) -> None:
        self.calls += 1
        self.run()


async def register(served: Served, folder: Path | None, name: str = "poet", **said: Any) -> AdapterReport:
    known = descriptor(name, **said)
    if folder is not None:
        served.store.folders[known.source.uri] = folder
    return await served.runtime.adapters.register(key_of(name), known)


def report_of(served: Served, name: str = "poet") -> AdapterReport:
    found = served.runtime.snapshot().adapter(key_of(name).uid, key_of(name).digest)
    assert found is not None
    return found


async def ask(served: Served, model: str = "team/poet", **wish: Any) -> tuple[int, Any]:
    body = {"model": model, "messages": HI, "max_tokens": 8, **wish}
    async with aiohttp.ClientSession(served.url) as http, http.post("/v1/chat/completions", json=body) as response:
        answer = await response.json()
        return response.status, answer["choices"][0] if response.status == 200 else answer["error"]


def prompt_of(served: Served) -> str:
    ids = served.engine.requests[-1].prompt_ids
    names = {START: "<|im_start|>", EOS: "<|im_end|>", PAD: "<|pad|>"}
    return "".join(names.get(token) or chr(token) for token in ids)


# --- templates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files", [{"chat_template_jinja": OWN}, {"tokenizer_config_json": {"chat_template": OWN}}], ids=["file", "config"]
)
async def test_an_adapters_own_template_writes_its_prompts_and_no_others(
    served: Served, tmp_path: Path, files: dict[str, Any]
) -> None:
    await register(served, write(tmp_path, **files))
    await register(served, None, "plain")
    assert (await ask(served))[0] == 200
    assert prompt_of(served) == "OWN hi GO"
    for other in ("tiny", "team/plain"):
        assert (await ask(served, other))[0] == 200
        assert prompt_of(served) == BASE_PROMPT
    assert (await ask(served))[0] == 200  # loaded now
    assert prompt_of(served) == "OWN hi GO"
    chat, plain = report_of(served).chat, report_of(served, "plain").chat
    assert chat is not None
    assert plain is not None
    assert (chat.template, plain.template) == (TemplateOrigin.SOURCE, TemplateOrigin.BASE)
    assert chat.template_digest != plain.template_digest
    base = served.runtime.snapshot().base.chat
    assert base is not None
    assert base.template is TemplateOrigin.SOURCE


async def test_an_adapter_brings_a_template_to_a_base_without_one(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path / "base", chat_template=None)
    async with serving(folder, engine=FakeEngine(), store=FakeStore()) as served:
        await register(served, write(tmp_path / "poet", chat_template_jinja=OWN))
        await register(served, None, "plain")
        assert (await ask(served))[0] == 200
        for other in ("tiny", "team/plain"):
            status, error = await ask(served, other)
            assert (status, error["code"]) == (400, "no_chat_template")


async def test_the_object_overrides_the_files_and_a_change_applies_to_the_next_request(
    served: Served, tmp_path: Path
) -> None:
    folder = write(tmp_path, chat_template_jinja=OWN)
    for said, prompt, origin in (
        (None, "OWN hi GO", TemplateOrigin.SOURCE),
        (ChatTemplate(inline="INLINE {{ messages[0].content }}"), "INLINE hi", TemplateOrigin.SPEC),
        (ChatTemplate(use=TemplateUse.BASE), BASE_PROMPT, TemplateOrigin.BASE),
        (ChatTemplate(use=TemplateUse.SOURCE), "OWN hi GO", TemplateOrigin.SOURCE),
    ):
        await register(served, folder, chat_template=said)
        assert (await ask(served))[0] == 200
        assert prompt_of(served) == prompt
        chat = report_of(served).chat
        assert chat is not None
        assert chat.template is origin
    assert served.engine.loads["poet"] + served.engine.loads[tmp_path.name] == 1  # nothing was loaded again


async def test_a_template_that_cannot_be_used_unloads_the_adapter_until_it_is_corrected(
    served: Served, tmp_path: Path
) -> None:
    await register(served, write(tmp_path))
    assert (await ask(served))[0] == 200
    await register(served, tmp_path, chat_template=ChatTemplate(inline="{% if %}"))
    await until(lambda: report_of(served).state is AdapterState.FAILED)
    failure = report_of(served).failure
    assert failure is not None
    assert failure.reason == FailureReason.INCOMPATIBLE
    assert "set spec.chatTemplate" in failure.message
    status, error = await ask(served)
    assert (status, error["code"]) == (422, "incompatible")
    await register(served, tmp_path, chat_template=ChatTemplate(inline="ok"))
    assert (await ask(served))[0] == 200


async def test_a_source_that_has_no_template_cannot_be_named_for_it(served: Served, tmp_path: Path) -> None:
    await register(served, write(tmp_path), chat_template=ChatTemplate(use=TemplateUse.SOURCE))
    status, error = await ask(served)
    assert status == 422
    assert "hold no chat template" in error["message"]


async def test_the_base_gets_a_template_from_its_object_and_again_when_it_changes(tmp_path: Path) -> None:
    folder, file = save_byte_tokenizer(tmp_path / "base", chat_template=None), tmp_path / "chat.json"
    async with serving(folder, engine=FakeEngine(), store=FakeStore(), sweep=True, chat_file=file) as served:
        await register(served, None, "plain")
        for text in ("ONE", "TWO"):
            said = {"chatTemplate": {"inline": text}, "generation": {"stopTokens": ["<|pad|>"]}}
            file.write_text(json.dumps(said))
            digest = served.runtime.snapshot().base.chat
            await until(lambda before=digest: served.runtime.snapshot().base.chat != before)  # type: ignore[misc]
            for model in ("tiny", "team/plain"):
                assert (await ask(served, model))[0] == 200
                assert prompt_of(served) == text
        chat = served.runtime.snapshot().base.chat
        assert chat is not None
        assert (chat.template, chat.stop_tokens) == (TemplateOrigin.SPEC, ["<|im_end|>", "<|pad|>"])
        file.write_text(json.dumps({"chatTemplate": {"inline": "{% if %}"}}))
        await until(lambda: (chat := served.runtime.snapshot().base.chat) is not None and chat.problem)
        chat = served.runtime.snapshot().base.chat
        assert chat is not None
        assert chat.template is TemplateOrigin.NONE


async def test_a_malformed_file_of_the_base_is_reported_once_until_it_changes(
    byte_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "chat.json"
    file.write_text("{")
    async with serving(byte_tokenizer, sweep=True, chat_file=file, sweep_interval_s=0.001) as served:
        sweeps = served.runtime.adapters.sweep = Counting(served.runtime.adapters.sweep)  # type: ignore[method-assign]
        await until(lambda: sweeps.calls > 5)
        assert [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()] == [
            f"spec.chatTemplate is not used: {file} cannot be read"
        ]
        file.write_text(json.dumps({"chatTemplate": {"inline": "ONE"}}))
        await until(lambda: (chat := served.runtime.snapshot().base.chat) and chat.template is TemplateOrigin.SPEC)


# --- end tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"generation_config_json": {"eos_token_id": PAD}}, {}),
        ({"generation_config_json": {"eos_token_id": [EOS, PAD]}}, {}),
        ({"tokenizer_config_json": {"eos_token": "<|pad|>"}}, {}),
        ({"tokenizer_config_json": {"eos_token": {"content": "<|pad|>"}}}, {}),
        ({}, {"generation": Generation(stop_tokens=["<|pad|>"])}),
        ({"generation_config_json": {"eos_token_id": 97}}, {"generation": Generation(stop_tokens=["<|pad|>"])}),
    ],
    ids=["id", "ids", "token", "added-token", "object", "object-wins"],
)
async def test_an_adapters_end_tokens_end_its_answers(
    served: Served, tmp_path: Path, files: dict[str, Any], said: dict[str, Any]
) -> None:
    served.engine.reply = lambda *_: [97, 98, PAD, 99]
    await register(served, write(tmp_path, **files), **said)
    _, choice = await ask(served)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")
    chat = report_of(served).chat
    assert chat is not None
    assert chat.stop_tokens == ["<|im_end|>", "<|pad|>"]
    _, choice = await ask(served, "tiny")
    assert choice["message"]["content"] == "abc"


async def test_an_end_token_of_the_adapter_may_end_an_answer_that_has_a_grammar(served: Served, tmp_path: Path) -> None:
    await register(served, write(tmp_path, generation_config_json={"eos_token_id": PAD}))
    tools = [{"type": "function", "function": {"name": "now"}}]
    for model, allowed in (("team/poet", 1), ("tiny", 0)):
        assert (await ask(served, model, tools=tools))[0] == 200
        request = served.engine.requests[-1]
        assert request.grammar is not None
        mask = request.grammar.constraint(request.sampling.stop_token_ids).mask()
        assert [mask[token // 8] >> token % 8 & 1 for token in (EOS, PAD)] == [1, allowed]


async def test_a_stop_token_that_the_model_does_not_have_is_refused(served: Served, tmp_path: Path) -> None:
    await register(served, write(tmp_path), generation=Generation(stop_tokens=["<|eot|>"]))
    status, error = await ask(served)
    assert status == 422
    assert "'<|eot|>'" in error["message"]


# --- tokenizers -------------------------------------------------------------------------------


def with_tokenizer(base: Path, folder: Path, *added: str, template: str = OWN) -> Path:
    made = AutoTokenizer.from_pretrained(base)
    made.add_special_tokens({"additional_special_tokens": list(added)})
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def formats(base: Path, rows: int) -> ChatFormats:
    return ChatFormats(tokenizer_of(base), rows=rows, eos_ids={EOS})


async def test_added_tokens_that_have_rows_are_tokens_in_prompts_and_as_ends(
    byte_tokenizer: Path, tmp_path: Path
) -> None:
    template = "<|turn|>{{ messages[0].content }}<|end|><|turn|>"
    folder = with_tokenizer(byte_tokenizer, tmp_path, "<|turn|>", "<|end|>", template=template)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = formats(byte_tokenizer, rows=300)
    chat = made.of_adapter(made.read(folder), None, None)
    tokenizer = tokenizer_of(byte_tokenizer)
    reference = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "a é"}]
    prompt = await tokenizer.prompt_of_messages(messages, chat=chat)
    assert list(prompt.ids) == reference.apply_chat_template(messages, return_dict=False)
    assert chat.stop_ids == {EOS, 260}
    assert chat.stop_tokens == ("<|im_end|>", "<|end|>")
    forged = await tokenizer.prompt_of_messages([{"role": "user", "content": "<|end|>"}], chat=chat)
    assert forged.ids.count(260) == 1
    text = "x<|turn|>é<|im_end|>y"
    ids = await tokenizer.prompt_of_text(text, extra=chat.extra)
    assert list(ids) == reference(text)["input_ids"]
    assert tokenizer.decode(ids, extra=chat.extra) == "xéy"
    assert tokenizer.decode(ids, skip_special=False, extra=chat.extra) == text


async def test_a_reserved_token_of_the_base_may_have_another_name(byte_tokenizer: Path, tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        tokenizer_config_json={
            "eos_token": "<|eot|>", "added_tokens_decoder": {"258": {"content": "<|eot|>", "special": True}},
        },
    )  # fmt: skip
    made = formats_of(byte_tokenizer)
    chat = made.of_adapter(made.read(folder), None, None)
    assert chat.stop_ids == {EOS, PAD}
    assert await tokenizer_of(byte_tokenizer).prompt_of_text("a<|eot|>", extra=chat.extra) == (97, PAD)


def refusal(base: Path, folder: Path, **said: Any) -> str:
    made = formats_of(base)
    with pytest.raises(ArtifactError) as caught:
        made.of_adapter(made.read(folder), said.get("template"), said.get("generation"))
    assert caught.value.reason is FailureReason.INCOMPATIBLE
    return caught.value.message


def test_a_token_in_use_without_a_row_is_refused_with_the_remedy(byte_tokenizer: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(byte_tokenizer, tmp_path, "<|turn|>", template="<|turn|>")
    message = refusal(byte_tokenizer, folder)
    assert "'<|turn|>'" in message
    assert f"{VOCAB} rows" in message
    made = formats_of(byte_tokenizer)
    assert made.of_adapter(made.read(folder), ChatTemplate(inline="x"), None).origin is TemplateOrigin.SPEC


def test_a_token_for_padding_needs_no_row(byte_tokenizer: Path, tmp_path: Path) -> None:
    made = formats_of(byte_tokenizer)
    folder = with_tokenizer(byte_tokenizer, tmp_path, "[PAD]")
    assert made.of_adapter(made.read(folder), None, None).extra.tokens == ()


def test_another_vocabulary_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(byte_tokenizer, tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArtifactError, match="another vocabulary"):
        formats_of(byte_tokenizer).read(folder)


def test_another_id_for_a_token_of_the_base_is_refused(byte_tokenizer: Path, tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"258": {"content": "<|im_end|>"}}}
    assert "gives it 257" in refusal(byte_tokenizer, write(tmp_path, tokenizer_config_json=config))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config_json": "{"}, FailureReason.CORRUPT_ARTIFACT),
        ({"generation_config_json": "[1]"}, FailureReason.CORRUPT_ARTIFACT),
        ({"chat_template_jinja": "x" * (256 * 1024 + 1)}, FailureReason.TOO_LARGE),
    ],
    ids=["cut", "list", "long"],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, files: dict[str, Any], reason: FailureReason
) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_chat_files(write(tmp_path, **files))
    assert caught.value.reason is reason
    assert next(iter(files)).rpartition("_")[0] in caught.value.message
