"""Tokens to text: whole characters, stop strings, independent of where chunks end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes_runtime import tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from lorapool_runtime.openai.detokenizer import MAX_PENDING_TOKENS, Detokenizer, StopFilter, TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=60))
def test_pieces_joined_are_the_text_and_no_piece_holds_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(decode_bytes)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=MAX_PENDING_TOKENS))
def test_any_bytes_come_out_as_one_decoding_of_all(raw: bytes) -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert "".join([detokenizer.push(byte) for byte in raw]) + detokenizer.finish() == decode_bytes(raw)


def test_garbage_without_end_is_not_held_back_for_ever() -> None:
    detokenizer = Detokenizer(decode_bytes)
    said = [detokenizer.push(0x80) for _ in range(100)]
    assert sum(len(piece) for piece in said) >= 100 - MAX_PENDING_TOKENS


def test_the_window_that_is_decoded_stays_small() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    detokenizer = Detokenizer(decode)
    for _ in range(1000):
        detokenizer.push(65)
    assert longest <= 3


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def first_complete(text: str, stops: list[str]) -> str:
    """What is left of `text` before the stop string that is complete first, the longer of two."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(st.lists(st.text("abcd", max_size=5), max_size=12), STOPS)
def test_where_a_chunk_ends_never_changes_what_is_sent(chunks: list[str], stops: list[str]) -> None:
    stop_filter, sent, stopped = StopFilter(stops), "", False
    for chunk in chunks:
        piece = stop_filter.push(chunk)
        sent += piece.text
        assert first_complete("".join(chunks), stops).startswith(sent)  # nothing has to be taken back
        if piece.stopped:
            stopped = True
            break
    if not stopped:
        sent += stop_filter.finish()
    assert sent == first_complete("".join(chunks), stops)


def test_a_stop_string_may_begin_inside_a_character_that_is_still_incomplete() -> None:
    stream = TextStream(decode_bytes, ["é!"])
    pieces = [stream.push(byte) for byte in b"caf" + "é!".encode()]
    assert [piece.text for piece in pieces] == ["c", "a", "f", "", "", ""]
    assert pieces[-1].stopped


def test_the_last_held_text_may_complete_a_stop_string() -> None:
    stream = TextStream(decode_bytes, ["\ufffd"])
    assert stream.push(0xC3).text == ""
    assert stream.finish().stopped


@given(text=st.text(max_size=30))
def test_the_true_tokenizer_decodes_piecewise_to_the_same_text(text: str, byte_tokenizer: Path) -> None:
    codec = tokenizer_of(byte_tokenizer)
    detokenizer = Detokenizer(codec.decode)
    assert "".join([detokenizer.push(byte) for byte in text.encode()]) + detokenizer.finish() == text


@pytest.mark.parametrize(("token_id", "expected"), [(0xC3, [0xC3]), (65, [65]), (32, [32]), (257, list(b"<|im_end|>"))])
def test_the_bytes_of_a_token_are_exact(byte_tokenizer: Path, token_id: int, expected: list[int]) -> None:
    assert tokenizer_of(byte_tokenizer).token_bytes(token_id) == expected
