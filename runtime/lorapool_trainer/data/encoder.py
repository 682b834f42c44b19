"""One example to token ids and the mask of counted tokens, with the chat template and tokenizer of the base or adapter.

A conversation is rendered up to each counted answer, once as the prompt that a server would continue and once with the
answer. Each rendering must begin with the one before: only then do the tokens that are trained after a prompt equal
those that a server generates after it. A template for which that does not hold is refused, never worked around.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lorapool_api.openai import InvalidRequestError
from lorapool_api.protocol import BaseChat
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.datasets.errors import DatasetError
from lorapool_artifacts.datasets.examples import ChatExample, CompletionExample, Example
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.chats.chat_formats import ChatFormats
from lorapool_runtime.openai.chats.template_options import TemplateOptions
from lorapool_runtime.openai.chats.tokenizer import Tokenizer
from lorapool_runtime.openai.json_body import Body
from lorapool_runtime.openai.messages import Message, parse_messages

RENDER_TIMEOUT_S = 10.0
_WITHOUT_PROMPT = TemplateOptions(add_generation_prompt=False)


class TokenExample(NamedTuple):
    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    """Of the same length: whether predicting this token counts in the loss."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Blocks. `stop_ids` end an answer; the first of them in an answer is the last token that counts."""

    tokenizer: Tokenizer
    formats: ChatFormats
    chat: ChatFormat
    stop_ids: frozenset[int]

    @classmethod
    def of_base(cls, folder: Path, said: BaseChat | None = None, *, rows: int) -> Encoder:
        """The encoder of a base's folder; `said`: what its object says about chats, `rows`: rows of its embedding.
        Raises TokenizerError."""
        tokenizer = Tokenizer(folder, threads=1, timeout_s=RENDER_TIMEOUT_S)
        ends = _generation_ends(folder)
        formats = ChatFormats(tokenizer, rows=rows, eos_ids=ends)
        if said is not None:
            formats.use_base(said)
        return cls(tokenizer, formats, formats.base, ends | formats.base.stop_ids)

    def of_adapter(self, folder: Path) -> Encoder:
        """The encoder with the chat template and tokens of an adapter's folder. Raises ArtifactError."""
        chat = self.formats.of_adapter(self.formats.read(folder), None, None)
        return replace(self, chat=chat, stop_ids=self.stop_ids | chat.stop_ids)

    def close(self) -> None:
        self.tokenizer.close()

    def encode(self, example: Example, line: int) -> TokenExample:
        """Raises DatasetError with reason TemplateUnsupported, or InvalidDataset for what serving would refuse."""
        try:
            found = self._chat(example, line) if isinstance(example, ChatExample) else self._completion(example)
        except InvalidRequestError as error:
            raise DatasetError(f"Example {line}: {error}", line=line) from error
        if not any(found.counted[1:]):
            raise DatasetError(f"Example {line}: its answers have no tokens, so there is nothing to learn.", line=line)
        return found

    def _completion(self, example: CompletionExample) -> TokenExample:
        prompt, completion = self.tokenizer.completion_ids(example.prompt, example.completion)
        return _joined([(prompt, False), ((*completion, *self._end()), True)])

    def _chat(self, example: ChatExample, line: int) -> TokenExample:
        if self.chat.template is None:
            _unsupported(line, "this base has no chat template; give lines with `prompt` and `completion`")
        if example.tools and not self.chat.shape.tools.native:
            _unsupported(line, "it has `tools`, which the chat template of this base does not write; remove them")
        messages = parse_messages(Body({"messages": list(example.messages)}, frozenset({"messages"})))
        chunks = self._chunks(messages, example, line)
        encoded = self.tokenizer.chunk_ids([text for text, _ in chunks], self.chat)
        parts = [part for ids, (_, counts) in zip(encoded, chunks, strict=True) for part in self._parts(ids, counts)]
        if not self.stop_ids & set(encoded[-1]) and chunks[-1][1]:
            parts.append((self._end(), True))
        return _joined(parts)

    def _chunks(self, messages: Sequence[Message], example: ChatExample, line: int) -> list[tuple[str, bool]]:
        """The rendered conversation in consecutive chunks, and whether each is a counted answer."""
        whole = self._text(messages, example, _WITHOUT_PROMPT)
        chunks: list[tuple[str, bool]] = []
        at = 0
        for place in example.counted:
            prompt = self._text(messages[:place], example, TemplateOptions())
            answered = (
                whole if place == len(messages) - 1 else self._text(messages[: place + 1], example, _WITHOUT_PROMPT)
            )
            if not (answered.startswith(prompt) and whole.startswith(answered) and len(prompt) >= at):
                _unsupported(line, _unstable(place + 1))
            chunks += [(whole[at : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            at = len(answered)
        return [(text, counts) for text, counts in (*chunks, (whole[at:], False)) if text]

    def _text(self, messages: Sequence[Message], example: ChatExample, options: TemplateOptions) -> str:
        return self.tokenizer.chat_text(messages, example.tools, self.chat, options) if messages else ""

    def _parts(self, ids: tuple[int, ...], counts: bool) -> list[tuple[tuple[int, ...], bool]]:
        """A counted answer ends with its first stop token: what the template writes after it is never generated."""
        end = next((place + 1 for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return [(ids[:end], True), (ids[end:], False)] if counts else [(ids, False)]

    def _end(self) -> tuple[int, ...]:
        own = self.tokenizer.eos_token_ids or self.stop_ids
        return (min(own),) if own else ()


def _joined(parts: Sequence[tuple[tuple[int, ...], bool]]) -> TokenExample:
    ids = tuple(token for own, _ in parts for token in own)
    return TokenExample(ids, tuple(counts for own, counts in parts for _ in own))


def _unstable(place: int) -> str:
    return (
        f"the chat template writes the conversation before message {place} differently once the answer is there, so an "
        "answer cannot be separated from its prompt; use lossOn: LastAssistant, or give one answer per line"
    )


def _unsupported(line: int, why: str) -> NoReturn:
    raise DatasetError(f"Example {line}: {why}.", line=line, reason=JobFailure.TEMPLATE_UNSUPPORTED)


def _generation_ends(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, as generation_config.json says, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        value = config.get("eos_token_id") or config.get("text_config", {}).get("eos_token_id")
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
