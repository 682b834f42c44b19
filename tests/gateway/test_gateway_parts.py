"""Pure modules of the gateway: settings, API keys, the SSE filter, metrics."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from typing import Any

import pytest
from gateway_world import KEY, api_key
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.openai import UnauthenticatedError
from lorapool_api.protocol import Usage
from lorapool_api.settings import SettingsError
from lorapool_gateway.metrics import Metrics, RequestRecord
from lorapool_gateway.requests.sse import EVENT_MAX_BYTES, EventFilter, EventTooLongError
from lorapool_gateway.routing.auth import ApiKey, ApiKeyError, KeyTable, authenticate, parse_key
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.settings import read_settings

ENV = {"LORAPOOL_GATEWAY_KEYS_NAMESPACE": "lorapool"}


# --- settings


def test_namespaces_are_a_list_or_all() -> None:
    assert read_settings({**ENV, "LORAPOOL_GATEWAY_NAMESPACES": "a, b"}).namespaces == {"a", "b"}
    assert read_settings({**ENV, "LORAPOOL_GATEWAY_NAMESPACES": "*"}).namespaces is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_REQESTS", "1"),
        ("API_PORT", "http"),
        ("NAMESPACES", ","),
        ("NAMESPACES", "Bad_Name"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_a_setting_that_cannot_work_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({**ENV, f"LORAPOOL_GATEWAY_{name}": value})
    assert name.lower() in str(caught.value).lower()


def test_the_keys_namespace_is_never_guessed() -> None:
    with pytest.raises(SettingsError, match="LORAPOOL_GATEWAY_KEYS_NAMESPACE"):
        read_settings({})


# --- keys


def secret(name: str = "k", **data: str) -> dict[str, Any]:
    encoded = {field: base64.b64encode(value.encode()).decode() for field, value in data.items()}
    return {"metadata": {"name": name}, "data": encoded}


def test_a_labelled_secret_becomes_a_key() -> None:
    digest = api_key(KEY).sha256
    key = parse_key(secret(keySha256=digest.upper(), namespaces="a, b", maxInFlight="7"))
    assert key == ApiKey("k", digest, frozenset({"a", "b"}), 7, uid="k")  # no object of a file has a uid
    assert parse_key(secret(keySha256=digest, namespaces="*")).permits(ObjectRef("anything", "x"))
    assert not key.permits(ObjectRef("c", "x"))
    assert digest not in repr(key)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"namespaces": "*"},
        {"keySha256": "a" * 64},
        {"keySha256": "plain-key", "namespaces": "*"},
        {"keySha256": "a" * 64, "namespaces": " , "},
        {"keySha256": "a" * 64, "namespaces": "*,a"},
        {"keySha256": "a" * 64, "namespaces": "../x"},
        {"keySha256": "a" * 64, "namespaces": "*", "maxInFlight": "0"},
        {"keySha256": "a" * 64, "namespaces": "*", "maxInFlight": "many"},
        {"keySha256": "a" * 64, "namespaces": "*", "expiry": "2027-01-31T12:00:00Z"},
        {"keySha256": "a" * 64, "namespaces": "*", "expires": "next week"},
        {"keySha256": "a" * 64, "namespaces": "*", "expires": "2027-01-31T12:00:00"},
        {"keySha256": "a" * 64, "namespaces": "*", "notBefore": ""},
        {"keySha256": "a" * 64, "namespaces": "*", "models": "short"},
        {"keySha256": "a" * 64, "namespaces": "*", "models": " "},
        {"keySha256": "a" * 64, "namespaces": "a,b", "defaultNamespace": "c"},
        {"keySha256": "a" * 64, "namespaces": "*", "defaultNamespace": "a,b"},
        {"keySha256": "a" * 64, "namespaces": "*", "owner": "two\nlines"},
        {"keySha256": "a" * 64, "namespaces": "*", "admin": "yes"},
    ],
)
def test_a_secret_that_is_not_fully_right_gives_no_access_and_leaks_nothing(data: dict[str, str]) -> None:
    with pytest.raises(ApiKeyError) as caught:
        parse_key(secret(**data))
    assert "plain-key" not in str(caught.value)


@given(st.text(max_size=80))
def test_no_header_but_the_right_one_authenticates(header: str) -> None:
    table = KeyTable.of([api_key(KEY)])
    if header != f"Bearer {KEY}":
        with pytest.raises(UnauthenticatedError):
            authenticate(table, header, 0.0)
    assert authenticate(table, f"bearer  {KEY} ", 0.0).id == api_key(KEY).id


# --- stream

EVENTS = [b'data: {"a": 1}', 'data: {"text": "é\\n: not a comment"}'.encode(), b"data: [DONE]"]


def internal(events: list[bytes], *, blank: bool) -> bytes:
    out = b": hello\n\n"
    for number, event in enumerate(events, start=1):
        usage = Usage(prompt_tokens=3, completion_tokens=number).model_dump_json().encode()
        out += b": lorapool-usage " + usage + (b"\n\n" if blank else b"\n") + event + b"\n\n"
    return out


@given(st.lists(st.integers(min_value=1, max_value=40), min_size=1), st.booleans())
def test_however_the_bytes_arrive_the_client_gets_the_data_events_and_nothing_else(
    sizes: list[int], blank: bool
) -> None:
    data, events, passed, at = internal(EVENTS, blank=blank), EventFilter(), b"", 0
    for number in range(len(data)):
        size = sizes[number % len(sizes)]
        passed += events.feed(data[at : at + size])
        at += size
    assert passed == b"".join(event + b"\n\n" for event in EVENTS)
    assert events.done
    assert not events.failed
    assert events.usage() == Usage(prompt_tokens=3, completion_tokens=3)


def test_an_error_and_the_end_are_recognized_among_other_events_and_the_last_usage_counts() -> None:
    events, error = EventFilter(), b'data: {"error": {"code": "x"}}'
    usages = [
        b': lorapool-usage {"prompt_tokens":3,"completion_tokens":%d,"cached_tokens":0}' % count for count in (1, 2)
    ]
    chunk = b"\n".join([usages[0], b"data: 1", b"", error, b"", b"data: [DONE]", b"", usages[1], b"", b""])
    assert events.feed(chunk) == b"data: 1\n\n" + error + b"\n\ndata: [DONE]\n\n"
    assert (events.failed, events.done) == (True, True)
    assert events.usage() == Usage(prompt_tokens=3, completion_tokens=2)


def test_the_end_inside_a_text_is_no_end() -> None:
    events = EventFilter()
    text = b'data: {"text": "data: [DONE] {\\"error\\""}\n\n'
    assert events.feed(text) == text
    assert (events.failed, events.done) == (False, False)


def test_an_event_without_end_is_refused() -> None:
    events = EventFilter()
    for _ in range(EVENT_MAX_BYTES // 2**20):
        assert events.feed(b"x" * 2**20) == b""
    with pytest.raises(EventTooLongError):
        events.feed(b"x")


def test_the_runtimes_own_error_event_passes_and_is_no_whole_answer() -> None:
    events = EventFilter()
    assert events.feed(b'data: {"error": {"code": "x"}}\n\n') == b'data: {"error": {"code": "x"}}\n\n'
    assert (events.failed, events.done) == (True, False)


# --- metrics


def finished(adapter: str | None, base: str = "demo/tiny") -> RequestRecord:
    names = None if adapter is None else (base, adapter)
    return RequestRecord(0.0, names, code=200, usage=Usage(prompt_tokens=1, completion_tokens=2))


def series(metrics: Metrics) -> int:
    return sum(len(list(family.samples)) for family in metrics.registry.collect())


def test_a_name_that_a_client_invents_adds_no_series() -> None:
    metrics = Metrics()
    metrics.finish(finished(None), 1.0)
    before = series(metrics)
    for _ in range(10_000):
        metrics.finish(finished(None), 1.0)
    assert series(metrics) == before


def test_adapters_beyond_the_cap_share_one_label() -> None:
    metrics = Metrics(max_tracked_adapters=2)
    metrics.sync(["demo/tiny"], {f"demo/a{number}": "demo/tiny" for number in range(5)})
    for number in range(5):
        metrics.finish(finished(f"demo/a{number}"), 1.0)
    get = metrics.registry.get_sample_value
    name, labels = "lorapool_gateway_requests_total", {"base": "demo/tiny", "code": "200"}
    assert get(name, {**labels, "adapter": "demo/a0"}) == 1
    assert get(name, {**labels, "adapter": "demo/a2"}) is None
    assert get(name, {**labels, "adapter": "__other__"}) == 3
    assert get("lorapool_gateway_adapters", {"base": "demo/tiny"}) == 5


def test_series_begin_at_zero_as_soon_as_their_object_is_known() -> None:
    metrics = Metrics()
    metrics.sync(["demo/tiny"], {"demo/a": "demo/tiny"})
    get = metrics.registry.get_sample_value
    for adapter in ("base", "demo/a"):
        labels = {"base": "demo/tiny", "adapter": adapter}
        assert get("lorapool_gateway_requests_total", {**labels, "code": "200"}) == 0
        for kind in ("prompt", "completion", "cached"):
            assert get("lorapool_gateway_tokens_total", {**labels, "type": kind}) == 0
    metrics.sync(["demo/tiny"], {})
    metrics.sync(["demo/tiny"], {"demo/a": "demo/tiny"})
    assert get("lorapool_gateway_requests_total", {**labels, "code": "200"}) == 0


def test_an_adapter_that_is_used_takes_the_series_of_one_that_is_not() -> None:
    metrics = Metrics(max_tracked_adapters=2)
    known = {f"demo/a{number}": "demo/tiny" for number in range(5)}
    metrics.sync(["demo/tiny"], known)
    metrics.finish(finished("demo/a4"), 1.0)
    metrics.sync(["demo/tiny"], known)
    get = metrics.registry.get_sample_value
    name, labels = "lorapool_gateway_requests_total", {"base": "demo/tiny", "code": "200"}
    assert [get(name, {**labels, "adapter": f"demo/a{number}"}) for number in range(5)] == [None, 0, None, None, 1]


def test_series_vanish_with_their_object_and_do_not_come_back_with_a_late_answer() -> None:
    metrics = Metrics()
    metrics.sync(["demo/tiny"], {"demo/a": "demo/tiny", "demo/b": "demo/tiny"})
    metrics.finish(finished("demo/a"), 1.0)
    metrics.finish(finished("demo/b"), 1.0)
    metrics.sync(["demo/tiny"], {"demo/b": "demo/tiny"})
    metrics.finish(finished("demo/a"), 1.0)
    text = metrics.text().decode()
    assert 'adapter="demo/a"' not in text
    assert 'adapter="demo/b"' in text
    metrics.sync([], {})
    assert "demo/" not in metrics.text().decode()


def test_metrics_follow_the_rules_of_prometheus() -> None:
    metrics = Metrics()
    metrics.sync(["demo/tiny"], {"demo/a": "demo/tiny"})
    metrics.finish(finished("demo/a"), 1.0)
    metrics.hold("demo/tiny", 1)
    metrics.retry("demo/tiny", "lost")
    metrics.wake("demo/tiny", "woken")
    tool = shutil.which("promtool")
    if tool is None:
        own = [family.name for family in metrics.registry.collect() if family.name.startswith("lorapool")]
        assert all(":" not in name and name.startswith("lorapool_gateway_") for name in own)
        return
    checked = subprocess.run([tool, "check", "metrics"], input=metrics.text(), capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr.decode()
    assert json.dumps(checked.stderr.decode().strip()) == '""'
