"""What objects say about chats reaches the runtimes, and what runtimes use reaches the status."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import adapter_world as one
import base_world as whole
import pytest
from adapter_world import OLD, adapter, base, plan, replica, report, settled
from pydantic import ValidationError

from lorapool_api.chat import ChatReport, ChatTemplate, TemplateOrigin, TemplateUse, chat_hash
from lorapool_api.protocol import AdapterState, BaseChat, BaseReport
from lorapool_operator.world.observed import ObservedAdapter, adapter_fingerprint

SAID: dict[str, Any] = {"chatTemplate": {"inline": "{{ messages }}"}, "generation": {"stopTokens": ["<|im_end|>"]}}
IN_USE = ChatReport(template=TemplateOrigin.SOURCE, template_digest="sha256:aa", stop_tokens=["<|im_end|>"])


def hash_of(**spec: Any) -> str:
    made = adapter(**spec).spec
    return chat_hash(made.chat_template, made.generation)


def test_every_runtime_that_knows_an_adapter_is_given_what_its_object_says() -> None:
    it = settled(adapter(**SAID), base())
    for state in (AdapterState.LOADED, AdapterState.REGISTERED):
        (made,) = plan(ObservedAdapter(it, base(), replicas=(replica(report(state)),))).registers
        assert made.descriptor.chat_template == ChatTemplate(inline="{{ messages }}")
        assert made.descriptor.chat_hash == hash_of(**SAID) != ""
    known = replica(report(AdapterState.REGISTERED, chat_hash=hash_of(**SAID)))
    assert plan(ObservedAdapter(it, base(), replicas=(known,))).registers == ()


def test_a_runtime_that_cannot_report_it_is_given_it_once() -> None:
    it = settled(adapter(**SAID), base())
    observed = ObservedAdapter(it, base(), replicas=(replica(report(AdapterState.REGISTERED)),))
    (made,) = plan(observed).registers
    assert plan(replace(observed, registered={("boot", OLD): made.descriptor})).registers == ()


def test_a_template_taken_back_reaches_the_runtime_too() -> None:
    it = settled(adapter(), base())
    held = replica(report(AdapterState.REGISTERED, chat_hash=hash_of(**SAID)))
    (made,) = plan(ObservedAdapter(it, base(), replicas=(held,))).registers
    assert (made.descriptor.chat_template, made.descriptor.generation) == (None, None)


def test_the_status_says_what_a_runtime_uses_and_keeps_it_while_none_has_the_files() -> None:
    it = settled(adapter(), base())
    made = plan(ObservedAdapter(it, base(), replicas=(replica(report(AdapterState.REGISTERED, chat=IN_USE)),)))
    assert made.status is not None
    assert made.status.chat == IN_USE
    it = replace(it, status=made.status)
    assert plan(ObservedAdapter(it, base(), replicas=(replica(),))).status is None
    changed = replace(it, meta=one.meta("a", "a-uid", generation=2))
    made = plan(ObservedAdapter(changed, base(), replicas=(replica(),)))
    assert made.status is not None
    assert made.status.chat is None


def test_a_changed_template_is_another_question_and_none_is_the_same_as_before() -> None:
    assert adapter_fingerprint(adapter(**SAID), base()) != adapter_fingerprint(adapter(), base())
    assert hash_of() == ""


def test_what_a_base_says_is_a_file_of_its_pods() -> None:
    made = whole.plan(whole.world(whole.base(**SAID)))
    files, deployment = made.children[0], made.children[1]
    assert BaseChat.model_validate_json(files["data"]["chat.json"]) == BaseChat.model_validate(SAID)
    env = {item["name"]: item.get("value") for item in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["LORAPOOL_RUNTIME_CHAT_FILE"] == "/etc/lorapool/token/chat.json"
    plain = whole.plan(whole.world(whole.base()))
    assert "chat.json" not in plain.children[0]["data"]
    assert plain.children[1]["spec"]["template"] == deployment["spec"]["template"]  # a change restarts no pod


def test_the_status_of_a_base_says_what_its_runtimes_use() -> None:
    said = BaseReport(served_name="t", max_model_len=64, dtype="f", chat=IN_USE)
    made = whole.plan(whole.world(whole.base(), runtimes=(whole.runtime(base=said),), pods=(whole.pod(),)))
    assert made.status is not None
    assert made.status.chat == IN_USE


@pytest.mark.parametrize("given", [{}, {"inline": ""}, {"inline": "x" * 32_769}, {"from": "Elsewhere"}], ids=str)
def test_templates_of_objects_are_bounded(given: dict[str, Any]) -> None:
    if given:
        with pytest.raises(ValidationError):
            ChatTemplate.model_validate(given)
    assert ChatTemplate.model_validate({"from": "Base"}).use is TemplateUse.BASE
    assert json.loads(ChatTemplate(use=TemplateUse.BASE).model_dump_json(by_alias=True))["from"] == "Base"
