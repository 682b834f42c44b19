"""Headers of safetensors files: those that the library writes are parsed, all others are refused without a crash."""

from __future__ import annotations

import json
from typing import Any

import artifact_zoo as zoo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.header import ADAPTER_BOUNDS, BASE_BOUNDS, HeaderBounds, parse_header

GOOD = zoo.safetensors(zoo.adapter_tensors())
ONE: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
ONE_TENSOR = json.dumps(ONE["a"]).encode()
EMPTY_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def parse(raw: bytes, bounds: HeaderBounds = ADAPTER_BOUNDS) -> Any:
    return parse_header(raw, len(raw), bounds, name="file")


def reason_of(raw: bytes, bounds: HeaderBounds = ADAPTER_BOUNDS) -> FailureReason:
    with pytest.raises(ArtifactError) as caught:
        parse(raw, bounds)
    return caught.value.reason


def test_a_good_file_is_read_with_its_offsets() -> None:
    header = parse(GOOD)
    assert len(header.tensors) == zoo.LAYERS * 4
    first = header.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert (first.dtype, first.shape) == ("BF16", (4, zoo.HIDDEN))
    assert min(tensor.start for tensor in header.tensors.values()) == 8 + int.from_bytes(GOOD[:8], "little")
    assert max(tensor.end for tensor in header.tensors.values()) == len(GOOD)


def test_the_file_that_the_library_writes_is_read() -> None:
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    raw = library.save(
        {"b": numpy.ones((3, 2), numpy.float32), "a": numpy.zeros((5,), numpy.float16)}, {"format": "pt"}
    )
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in parse(raw).tensors.items()} == {
        "a": ("F16", (5,)),
        "b": ("F32", (3, 2)),
    }


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        GOOD[:8],
        GOOD[:50],
        GOOD[:-1],
        GOOD + b"\0",
        (2**63).to_bytes(8, "little") + GOOD[8:],
        (0).to_bytes(8, "little") + GOOD[8:],
        zoo.with_header(b"[]", b""),
        zoo.with_header(b"{}", b""),
        zoo.with_header(b"null", b""),
        zoo.with_header(b"{" * 100_000, b""),
        zoo.with_header(b"[" * 100_000, b""),
        zoo.with_header(b'{"a": 1' + b"0" * 10_000 + b"}", b""),
        zoo.with_header(b'\xff\xfe{"a":1}', b""),
        zoo.with_header(b" " + json.dumps(ONE).encode(), b"\0" * 8),
        zoo.with_header(b'{"a":' + ONE_TENSOR + b',"a":' + ONE_TENSOR + b"}", b"\0" * 8),
        zoo.with_header({"__metadata__": {"a": 1}, **ONE}, b"\0" * 8),
        zoo.with_header({"__metadata__": {"a": "b"}}, b""),
        zoo.with_header({"a": {**ONE["a"], "shape": [2.0]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "shape": [True, 2]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "shape": [-1, -2]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "shape": [2**62, 2**62]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "shape": [3]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "data_offsets": [8, 0]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "data_offsets": [0, 8, 9]}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
        zoo.with_header({"a": {**ONE["a"], "extra": 1}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "dtype": "F31"}}, b"\0" * 8),
        zoo.with_header({"a": {**ONE["a"], "dtype": ["F32"]}}, b"\0" * 8),
        zoo.with_header({"a": None}, b""),
        zoo.with_header({**ONE, "b": {**ONE["a"], "data_offsets": [4, 12]}}, b"\0" * 12),
        zoo.with_header({**ONE, "b": ONE["a"]}, b"\0" * 8),
        zoo.with_header({**ONE, "b": {**ONE["a"], "data_offsets": [12, 20]}}, b"\0" * 20),
        zoo.with_header({"x" * 600: ONE["a"]}, b"\0" * 8),
        zoo.with_header({f"t{index}": EMPTY_TENSOR for index in range(10_001)}, b""),
        zoo.with_header(json.dumps({"__metadata__": {"a": "x" * 1_100_000}, **ONE}).encode(), b"\0" * 8),
    ],
)  # fmt: skip
def test_a_malformed_file_is_corrupt(raw: bytes) -> None:
    assert reason_of(raw) is FailureReason.CORRUPT_ARTIFACT


def test_an_adapter_in_integers_is_refused_but_a_base_may_hold_them() -> None:
    raw = zoo.safetensors({"a": ("I64", (2,))})
    assert reason_of(raw) is FailureReason.UNSUPPORTED_FORMAT
    assert parse(raw, BASE_BOUNDS).tensors["a"].shape == (2,)


def test_trailing_blanks_of_the_header_are_allowed() -> None:
    assert parse(zoo.with_header(json.dumps(ONE).encode() + b"   ", b"\0" * 8)).tensors["a"].shape == (2,)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_read_within_its_bounds(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    end = 8 + int.from_bytes(GOOD[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    _read_or_refused(bytes(raw))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=8)
            | st.sampled_from(["F32", "BF16"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
            ),
            max_leaves=8,
        ),
        max_size=4,
    ),
    st.binary(max_size=32),
)
def test_an_arbitrary_header_is_refused_or_read_within_its_bounds(header: dict[str, Any], body: bytes) -> None:
    _read_or_refused(zoo.with_header(header, body))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    _read_or_refused(raw)


def _read_or_refused(raw: bytes) -> None:
    reason = None
    try:
        header = parse(raw)
        assert all(8 <= tensor.start <= tensor.end <= len(raw) for tensor in header.tensors.values())
    except ArtifactError as error:
        reason = error.reason
    assert reason in (None, FailureReason.CORRUPT_ARTIFACT, FailureReason.UNSUPPORTED_FORMAT)
