"""A file to its examples: each line's format is found, checked against the file's, and the line is parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

from lorapool_api.tuning.finetunejob import MIN_EXAMPLES, DataFormat, LossOn
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.datasets.chat import chat_example
from lorapool_artifacts.datasets.errors import DatasetError, shown
from lorapool_artifacts.datasets.examples import CompletionExample, Example
from lorapool_artifacts.datasets.lines import read_objects

MIN_VALIDATION_EXAMPLES = 1
_NAMES = {DataFormat.CHAT: "a chat example", DataFormat.PROMPT_COMPLETION: "a prompt with a completion"}
_PREFERENCE_KEYS = frozenset({"preferred_output", "non_preferred_output"})
_COMPLETION_KEYS = frozenset({"prompt", "completion"})


class NumberedExample(NamedTuple):
    line: int
    example: Example


class DatasetSummary(NamedTuple):
    format: DataFormat
    """Never Auto."""
    examples: int


def read_examples(
    file: BinaryIO, data_format: DataFormat = DataFormat.AUTO, loss_on: LossOn = LossOn.ASSISTANT
) -> Iterator[NumberedExample]:
    """Yields the examples of a file in its order. Raises DatasetError for the first line that is wrong."""
    expected = data_format
    for number, line in read_objects(file):
        found = _format_of(line, number, expected)
        if expected is DataFormat.AUTO:
            expected = found
        elif found is not expected:
            why = "by the job's `format`" if data_format is not DataFormat.AUTO else "as in the lines before"
            _refuse(number, f"it is {_NAMES[found]}, but {_NAMES[expected]} is expected {why}")
        yield NumberedExample(number, _example(line, number, found, loss_on))


def check_dataset(
    file: BinaryIO,
    data_format: DataFormat = DataFormat.AUTO,
    loss_on: LossOn = LossOn.ASSISTANT,
    minimum: int = MIN_EXAMPLES,
) -> DatasetSummary:
    """Reads the whole file. Raises DatasetError, also for fewer examples than `minimum`."""
    count, found = 0, data_format
    for _, example in read_examples(file, data_format, loss_on):
        count += 1
        is_completion = isinstance(example, CompletionExample)
        found = DataFormat.PROMPT_COMPLETION if is_completion else DataFormat.CHAT
    check_count(count, minimum)
    return DatasetSummary(found, count)


def check_count(count: int, minimum: int) -> None:
    """Raises DatasetError for too few examples."""
    if count < minimum:
        what = "The file is empty" if count == 0 else f"The file has {count} example{'s' * (count != 1)}"
        raise DatasetError(
            f"{what}; at least {minimum} {'is' if minimum == 1 else 'are'} needed.",
            reason=JobFailure.TOO_FEW_EXAMPLES,
        )


def _format_of(line: Mapping[str, Any], number: int, expected: DataFormat) -> DataFormat:
    if line.keys() & _PREFERENCE_KEYS:
        _refuse(number, "it is a preference pair, which supervised training cannot use; give chat examples")
    if "messages" in line:
        return DataFormat.CHAT
    if line.keys() & _COMPLETION_KEYS:
        return DataFormat.PROMPT_COMPLETION
    wanted = "`prompt` and `completion`" if expected is DataFormat.PROMPT_COMPLETION else "`messages`"
    _refuse(number, f"it has no {wanted}")


def _example(line: Mapping[str, Any], number: int, found: DataFormat, loss_on: LossOn) -> Example:
    return chat_example(line, number, loss_on) if found is DataFormat.CHAT else _completion(line, number)


def _completion(line: Mapping[str, Any], number: int) -> CompletionExample:
    if unknown := sorted(line.keys() - _COMPLETION_KEYS):
        _refuse(number, f"the key {shown(unknown[0])} is unknown; there are prompt and completion")
    for name in sorted(_COMPLETION_KEYS):
        if not isinstance(line.get(name), str) or not line[name]:
            _refuse(number, f"`{name}` must be a non-empty string")
    return CompletionExample(line["prompt"], line["completion"])


def _refuse(number: int, why: str) -> NoReturn:
    raise DatasetError(f"Example {number}: {why}.", line=number)
