"""Headers of safetensors files: those that the library writes are parsed, all others are refused without a crash."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from random import Random
from typing import Any

import artifact_zoo as zoo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.header import ADAPTER_BOUNDS, BASE_BOUNDS, HeaderBounds, header_length, parse_header
from lorapool_artifacts.errors import ArtifactError

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
    ],
)  # fmt: skip
def test_a_malformed_file_is_corrupt(raw: bytes) -> None:
    assert reason_of(raw) is FailureReason.CORRUPT_ARTIFACT


def test_every_expert_of_the_largest_mixtures_can_be_adapted() -> None:
    """Qwen3-235B-A22B has 94 layers of 128 experts, Kimi K2 60 of 384; each has three matrices, each two of LoRA."""
    for layers, experts in ((94, 128), (60, 384)):
        names = (
            f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.lora_{part}.weight"
            for layer in range(layers)
            for expert in range(experts)
            for matrix in ("gate", "down", "up")
            for part in "AB"
        )
        header = {name: {"dtype": "BF16", "shape": [64, 7168], "data_offsets": [0, 0]} for name in names}
        raw = json.dumps(header, separators=(",", ":")).encode()
        assert len(header) < ADAPTER_BOUNDS.max_tensors
        assert header_length(len(raw).to_bytes(8, "little"), 10**12, ADAPTER_BOUNDS, name="a") == len(raw)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({f"t{index}": EMPTY_TENSOR for index in range(1001)}, "holds 1001 tensors, more than the 1000"),
        ({"__metadata__": {"a": "x" * 1_100_000}, **ONE}, "more than the 1048576 bytes"),
    ],
)
def test_a_bound_of_ours_is_called_so_with_the_setting_that_raises_it(header: dict[str, Any], words: str) -> None:
    raw = zoo.with_header(header, b"" if len(header) > 2 else b"\0" * 8)
    with pytest.raises(ArtifactError, match=words) as caught:
        parse(raw, HeaderBounds(max_tensors=1000))
    assert caught.value.reason is FailureReason.TOO_LARGE
    assert "not damaged" in caught.value.message
    assert "Raise LORAPOOL_MAX_TENSORS (now 1000)" in caught.value.message


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


def _read_or_refused(raw: bytes) -> bool:
    """Whether the file is read; any other outcome than a refusal fails."""
    reason = None
    try:
        header = parse(raw)
        assert all(8 <= tensor.start <= tensor.end <= len(raw) for tensor in header.tensors.values())
    except ArtifactError as error:
        reason = error.reason
    assert reason in (None, FailureReason.CORRUPT_ARTIFACT, FailureReason.UNSUPPORTED_FORMAT)
    return reason is None


SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "F31": 4, "": 0, "bf16": 2}
NUMBERS = (0, 1, 2, 3, 5, 8, 2**31, 2**63 - 1, 2**63, -1)


def _damaged(random: Random) -> bytes:
    """A file of the library's format: a valid one, or one with a fault in the tensors, the bytes or the length."""
    faulty, header, position = random.random() < 0.6, {}, 0
    for index in range(random.randrange(1, 9)):
        dtype = random.choice(list(SIZES) if faulty else ["F32", "BF16", "F16"])
        shape = random.choices(NUMBERS if faulty else NUMBERS[:6], k=random.randrange(4) if faulty else 2)
        length = random.choice(NUMBERS) if faulty and random.random() < 0.3 else math.prod(shape) * SIZES[dtype]
        header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    raw = bytearray(zoo.with_header(header, bytes(min(max(position, 0), 4096))))
    if random.random() < 0.3:
        raw[random.randrange(len(raw))] = random.randrange(256)
    if random.random() < 0.1:
        raw[:8] = random.choice([0, 1, len(raw), 2**31, 2**63]).to_bytes(8, "little")
    if random.random() < 0.1:
        del raw[random.randrange(len(raw)) :]
    return bytes(raw)


PEAK_BYTES = 1_000_000
"""For a header of a few tensors, however large the tensors are said to be."""


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.deep)])
def test_no_header_crashes_the_reader_or_takes_memory_beyond_a_bound(count: int) -> None:
    random, outcomes = Random(11), Counter[bool]()
    tracemalloc.start()
    try:
        for _ in range(count):
            raw = _damaged(random)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            outcomes[_read_or_refused(raw)] += 1
            assert tracemalloc.get_traced_memory()[1] - before < PEAK_BYTES, raw[:1000]
    finally:
        tracemalloc.stop()
    assert min(outcomes[True], outcomes[False]) > count / 10, "many are read and many are refused"


def test_a_header_takes_a_kilobyte_of_memory_for_each_tensor() -> None:
    count = 20_000
    raw = zoo.with_header({f"t{index}": EMPTY_TENSOR for index in range(count)}, b"")
    tracemalloc.start()
    try:
        parse(raw)
        assert tracemalloc.get_traced_memory()[1] < count * 1000
    finally:
        tracemalloc.stop()
