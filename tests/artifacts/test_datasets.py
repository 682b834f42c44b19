"""The structure of training files: what is accepted, and the line and sentence with which the rest is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.tuning.finetunejob import DataFormat, LossOn
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.datasets.examples import ChatExample, CompletionExample
from lorapool_artifacts.datasets.lines import MAX_LINE_BYTES, read_objects
from lorapool_artifacts.datasets.reader import check_dataset, read_examples

USER = {"role": "user", "content": "Good morning."}
ANSWER = {"role": "assistant", "content": "Buenos días."}
CHAT = json.dumps({"messages": [USER, ANSWER]}).encode()
COMPLETION = b'{"prompt": "Good morning. ->", "completion": " Buenos d\xc3\xadas."}'
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def chat(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


def examples(*lines: bytes, **options: Any) -> list[Any]:
    return [item.example for item in read_examples(io.BytesIO(b"\n".join(lines)), **options)]


def refusal(*lines: bytes, **options: Any) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        check_dataset(io.BytesIO(b"\n".join(lines)), **options)
    return caught.value


def test_chat_lines_become_conversations_whose_assistant_messages_count() -> None:
    found = examples(chat({"role": "system", "content": "Translate."}, USER, ANSWER, USER, ANSWER, tools=[TOOL]))
    assert [(type(item), item.counted, len(item.tools)) for item in found] == [(ChatExample, (2, 4), 1)]


def test_weight_0_and_last_assistant_leave_messages_out_of_the_loss() -> None:
    line = chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, ANSWER)
    assert examples(line)[0].counted == (3, 5)
    assert examples(line, loss_on=LossOn.LAST_ASSISTANT)[0].counted == (5,)


def test_prompts_with_completions_are_read() -> None:
    assert examples(COMPLETION) == [CompletionExample("Good morning. ->", " Buenos días.")]


def test_a_byte_order_mark_windows_line_ends_and_blank_last_lines_are_accepted() -> None:
    text = b"\xef\xbb\xbf" + b"\r\n".join([CHAT] * 10) + b"\r\n\r\n  \n"
    assert check_dataset(io.BytesIO(text)) == (DataFormat.CHAT, 10)


def test_copied_answers_may_keep_their_empty_fields() -> None:
    copied = {**ANSWER, "refusal": None, "audio": None, "annotations": [], "tool_calls": None}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "found"}]}
    assert examples(chat(USER, calling, answered, copied))[0].counted == (1, 3)


@pytest.mark.parametrize(("count", "said"), [(0, "The file is empty"), (1, "1 example;"), (9, "9 examples;")])
def test_too_few_examples_are_refused_with_their_count_and_the_minimum(count: int, said: str) -> None:
    error = refusal(*[CHAT] * count)
    assert (error.code, error.reason) == ("invalid_n_examples", JobFailure.TOO_FEW_EXAMPLES)
    assert said in error.message
    assert "at least 10" in error.message


BAD_LINES = {
    b"hello": "not valid JSON",
    b"[1, 2]": "an array, not a JSON object",
    b"null": "null, not a JSON object",
    b'{"messages": [{"role": "us': "cut off",
    b'{"messages": "\xff"}': "not UTF-8 (byte 15",
    b'{"messages": "\0"}': "NUL byte",
    b'{"messages": NaN}': "NaN is not a JSON number",
    b'{"messages": "\\ud800"}': "unpaired surrogate",
    b'{"messages": ' + b"[" * 100_000: "nested too deeply",
    b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}': f"longer than {MAX_LINE_BYTES} bytes",
    b"": "is blank",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: str(line[:24]))
def test_a_line_that_is_no_json_object_is_refused_by_its_number(line: bytes) -> None:
    error = refusal(CHAT, CHAT, line, CHAT)
    assert (error.code, error.line) == ("invalid_training_file", 3)
    assert error.message.startswith("Line 3 ")
    assert BAD_LINES[line] in error.message


BAD_MESSAGES: list[tuple[bytes, str]] = [
    (b"{}", "Example 2: it has no `messages`"),
    (b'{"messages": []}', "Example 2: `messages` must be a non-empty list"),
    (b'{"messages": {}}', "Example 2: `messages` must be a non-empty list"),
    (chat(USER, ANSWER, model="gpt"), 'Example 2: the key "model" is unknown'),
    (chat(USER, {"content": "Hola"}), "Example 2, message 2: it has no `role`"),
    (chat(USER, {"role": "bot", "content": "Hola"}), 'Example 2, message 2: it has the unknown role "bot"'),
    (chat(USER, "Hola"), "Example 2, message 2: it must be an object"),
    (chat({"role": "user", "content": None}, ANSWER), "Example 2, message 1: `content` is missing or null"),
    (chat(USER, {"role": "assistant"}), "Example 2, message 2: `content` is missing or null"),
    (chat(USER, {"role": "assistant", "content": 7}), "Example 2, message 2: `content` is 7"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "Example 2, message 1: `content` must be"),
    (chat(USER), "Example 2: it has no message of the assistant"),
    (chat(USER, {**ANSWER, "weight": 0}), "Example 2: all messages of the assistant have weight 0"),
    (chat(USER, {**ANSWER, "weight": 0.5}), "Example 2, message 2: `weight` is 0.5; it must be 0 or 1"),
    (chat(USER, {**ANSWER, "weight": "1"}), 'Example 2, message 2: `weight` is "1"; it must be 0 or 1'),
    (chat(USER, {**ANSWER, "weight": True}), "Example 2, message 2: `weight` is True; it must be 0 or 1"),
    (chat({**USER, "weight": 1}, ANSWER), "Example 2, message 1: `weight` is not a key of a message of role user"),
    (chat(USER, {**ANSWER, "colour": "red"}), 'Example 2, message 2: the key "colour" is unknown'),
    (chat(USER, {**ANSWER, "function_call": {"name": "f"}}), 'Example 2, message 2: the key "function_call"'),
    (chat(USER, {**ANSWER, "tool_calls": [{"function": {}}]}), "Example 2, message 2: each of `tool_calls`"),
    (chat(USER, {"role": "tool", "content": "x", "tool_call_id": 3}, ANSWER), "message 2: `tool_call_id` must be"),
    (chat(USER, ANSWER, tools=[{"name": "look_up"}]), "Example 2: `tools` must be a list"),
    (chat(USER, ANSWER, parallel_tool_calls="no"), "Example 2: `parallel_tool_calls` must be true or false"),
    (COMPLETION, "Example 2: it is a prompt with a completion, but a chat example is expected as in the lines before"),
    (b'{"input": {}, "preferred_output": [], "non_preferred_output": []}', "Example 2: it is a preference pair"),
]


@pytest.mark.parametrize(("line", "said"), BAD_MESSAGES, ids=[said for _, said in BAD_MESSAGES])
def test_a_wrong_field_is_refused_by_example_and_message(line: bytes, said: str) -> None:
    error = refusal(CHAT, line, CHAT)
    assert (error.code, error.reason, error.line) == ("invalid_training_file", JobFailure.INVALID_DATASET, 2)
    assert said in error.message


def test_weights_of_other_answers_do_not_help_when_only_the_last_one_counts() -> None:
    error = refusal(chat(USER, ANSWER, USER, {**ANSWER, "weight": 0}), loss_on=LossOn.LAST_ASSISTANT)
    assert "the last message of the assistant" in error.message


def test_a_file_of_another_format_than_the_job_says_is_refused() -> None:
    error = refusal(CHAT, data_format=DataFormat.PROMPT_COMPLETION)
    assert (error.line, "by the job's `format`" in error.message) == (1, True)


@pytest.mark.parametrize("line", [b'{"prompt": "a"}', b'{"prompt": "a", "completion": ""}', b'{"completion": "a"}'])
def test_a_prompt_or_completion_that_is_missing_or_empty_is_refused(line: bytes) -> None:
    assert "must be a non-empty string" in refusal(line).message


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_a_line(data: bytes) -> None:
    found: DatasetError | None = None
    try:
        assert all(isinstance(value, dict) for _, value in read_objects(io.BytesIO(data)))
    except DatasetError as error:
        found = error
    assert found is None or str(found.line) in found.message
