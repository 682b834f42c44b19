"""The one exception of this room: a data set that cannot be trained on, with the line at fault."""

from __future__ import annotations

from lorapool_api.tuning.states import JobFailure

MAX_SHOWN_CHARS = 40


class DatasetError(Exception):
    """`message` is a sentence or two for the owner of the data, with the remedy; `line` counts from 1."""

    def __init__(
        self, message: str, *, line: int | None = None, reason: JobFailure = JobFailure.INVALID_DATASET
    ) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.reason = reason

    def of_validation(self) -> DatasetError:
        """The same error of a job's other file."""
        return DatasetError(f"In the validation file: {self.message}", line=self.line, reason=self.reason)

    @property
    def code(self) -> str:
        """The `error.code` of OpenAI's job object."""
        return self.reason.code


def shown(value: object) -> str:
    """A value of the data for a message: shortened, in printable ASCII."""
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    text = text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
    return "".join(letter if letter.isprintable() else "?" for letter in text)
