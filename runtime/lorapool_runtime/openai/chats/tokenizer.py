"""The base's tokenizer, with the chat templates of the base and its adapters, run off the event loop in limited time.

Templates are rendered by `template_process`, in processes of their own. Control tokens inside message texts are encoded
as plain text, so no client can forge a turn. Slow (Python) tokenizers are refused.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorapool_api.openai import InvalidRequestError, UnavailableError
from lorapool_runtime.openai.chats.chat_format import AddedToken, ChatFormat, ExtraTokens
from lorapool_runtime.openai.chats.fair_pool import FairPool
from lorapool_runtime.openai.chats.template_options import TemplateOptions
from lorapool_runtime.openai.chats.template_process import TemplateProcesses, TemplateRefusedError, TemplateTimeoutError
from lorapool_runtime.openai.chats.template_shape import fit
from lorapool_runtime.openai.detokenizer import EchoedPrompt, echo_prompt
from lorapool_runtime.openai.reasoning import END, ReasoningStart, reasoning_start, split_reasoning
from lorapool_runtime.openai.tools.tool_format import plain_messages

T = TypeVar("T")

ONE_TOKEN_TEXTS = 16 * 1024
"""Cached texts of single tokens: about 2 MB, and nearly all the tokens that a language uses."""
BREAK = "\U000f0000"
"""A private character that is put into control tokens of message texts, and taken out before they are encoded."""
MAX_FORGED = 4096
"""Control tokens in the texts of one request: each is encoded by itself."""
RENDER_SHARE = 0.8
"""The part of a prompt's time that its template may take: one that does not end is reported as such."""
DEFAULT_OPTIONS = TemplateOptions()
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")
_NO_EXTRA = ExtraTokens()


class TokenizerError(Exception):
    """The folder has no usable tokenizer; the message says why."""


class ChatPrompt(NamedTuple):
    ids: tuple[int, ...]
    reasoning: ReasoningStart = ReasoningStart.NONE
    """Whether the answer begins with reasoning."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Ids to the text that a client receives, for one request."""

    tokenizer: Tokenizer
    extra: ExtraTokens = _NO_EXTRA
    skip_special: bool = True

    def __call__(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=self.skip_special, extra=self.extra)

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of a control token."""
        added = self.extra.by_id.get(token_id)
        return added.text if added is not None else self.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, which may be an incomplete character."""
        added = self.extra.by_id.get(token_id)
        return list(added.text.encode()) if added is not None else self.tokenizer.token_bytes(token_id)


class Tokenizer:
    """Prompts to ids and ids to text.

    What is awaited runs in worker threads, of which each tenant has a share; the rest is fast and thread-safe.
    """

    def __init__(
        self, folder: Path, *, threads: int, timeout_s: float, processes: TemplateProcesses | None = None
    ) -> None:
        """`processes` renders templates, and is closed with the tokenizer if it is not given."""
        from transformers import AutoTokenizer  # takes seconds, so not at the top of the module

        try:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{folder} has no tokenizer that transformers can read: {error}") from error
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(f"{folder}: the tokenizer has no tokenizer.json; only fast tokenizers are used")
        backend.no_truncation()
        backend.no_padding()
        self.folder = folder
        self._backend: Any = backend
        self._timeout_s = timeout_s
        self._pool = FairPool(threads, "tokenize")
        self._owns_processes = processes is None
        self.processes = processes or TemplateProcesses(threads, timeout_s * RENDER_SHARE)
        self._byte_level = _is_byte_level(backend)
        # Cached, because every step of every stream decodes its last token alone.
        self._decode_one = functools.lru_cache(ONE_TOKEN_TEXTS)(
            lambda token_id: str(backend.decode([token_id], skip_special_tokens=True))
        )
        self.added_tokens = tuple(
            AddedToken(token_id, token.content, token.special) for token_id, token in inner.added_tokens_decoder.items()
        )
        self._characters_per_token = _characters_per_token(backend) if self._byte_level else 0
        self._newline_ids = self._encode_parts(["\n"])[0]
        self.chat_template: str | Mapping[str, str] | None = inner.chat_template
        self.special_tokens: Mapping[str, str] = {
            name: value for name, value in inner.special_tokens_map.items() if isinstance(value, str)
        }
        eos, bos = inner.eos_token_id, inner.bos_token_id
        self.eos_token_ids = frozenset([eos] if isinstance(eos, int) else [])
        self._bos_id: int | None = bos if isinstance(bos, int) else None

    def close(self) -> None:
        self._pool.close()
        if self._owns_processes:
            self.processes.close()

    # --- prompts ------------------------------------------------------------------------

    def grammar_json(self) -> str:
        """The tokenizer as JSON text, for the grammar library."""
        text: str = self._backend.to_str()
        return text

    def id_text(self, token_id: int) -> str | None:
        """The text of a token as the vocabulary has it; None for an id that stands for nothing."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def vocabulary_text(self, token_id: int, extra: ExtraTokens) -> str:
        """The text of a token as the vocabulary, or an adapter's additions to it, have it; empty for an unused id."""
        added = extra.by_id.get(token_id)
        return added.text if added is not None else self.id_text(token_id) or ""

    def token_id(self, text: str) -> int | None:
        """The id of a token by its text; None when there is no such token."""
        found: int | None = self._backend.token_to_id(text)
        return found

    async def prompt_of_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        chat: ChatFormat,
        options: TemplateOptions = DEFAULT_OPTIONS,
        tenant: str = "",
    ) -> ChatPrompt:
        """Ids of a conversation, up to the beginning of the assistant's turn.

        Raises InvalidRequestError for what the template refuses, UnavailableError after the timeout.
        """
        if chat.template is None:
            raise InvalidRequestError(
                "This model has no chat template: it is not made for chat. Send a `prompt` to /v1/completions instead, "
                "or let the owner of the model set spec.chatTemplate.",
                param="messages",
                code="no_chat_template",
            )
        return await self._within_limits(
            functools.partial(self._chat_prompt, messages, tools, chat, options, tenant), tenant
        )

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text, without tokenizing it; 0 where none is known."""
        return -(-len(text) // self._characters_per_token) if self._characters_per_token else 0

    async def prompt_of_text(
        self, text: str, *, extra: ExtraTokens = _NO_EXTRA, start_token: bool = True, tenant: str = ""
    ) -> tuple[int, ...]:
        """Ids of a prompt without a template, with the start token if the base has one. Raises UnavailableError."""
        return await self._within_limits(functools.partial(self._encode, text, extra, start_token), tenant)

    async def echo(self, token_ids: Sequence[int], *, decode: Decoder, tenant: str = "") -> EchoedPrompt:
        """The decoded prompt, for a response that begins with it. Raises UnavailableError."""
        return await self._within_limits(functools.partial(echo_prompt, decode, token_ids), tenant)

    async def text_of(self, ids: Sequence[int], *, extra: ExtraTokens = _NO_EXTRA, tenant: str = "") -> str:
        """The text of many tokens, also of control tokens. Raises UnavailableError."""
        return await self._within_limits(functools.partial(self.decode, ids, skip_special=False, extra=extra), tenant)

    def _chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        chat: ChatFormat,
        options: TemplateOptions,
        tenant: str,
    ) -> ChatPrompt:
        text = self.chat_text(messages, tools, chat, options, tenant)
        reasoning = reasoning_start(text, continues=options.continue_final) if chat.thinks else ReasoningStart.NONE
        return ChatPrompt(self._encode_marked(text, chat.extra), reasoning)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        chat: ChatFormat,
        options: TemplateOptions = DEFAULT_OPTIONS,
        tenant: str = "",
    ) -> str:
        """A conversation as its template writes it, with a break in each control token of a message. Blocks.

        `chat` must have a template. Raises InvalidRequestError for what the template refuses.
        """
        if not chat.shape.tools.native:
            messages, tools = plain_messages(messages, tools), ()
        messages = fit(_with_reasoning(messages, options) if chat.thinks else messages, chat.shape)
        if options.continue_final and messages[-1]["role"] != "assistant":
            raise InvalidRequestError(
                "`continue_final_message` needs a last message of the assistant.", param="continue_final_message"
            )
        self._refuse_control_keys([*messages, *tools, options.variables], chat)
        marked = _Marker(chat.control_tokens)
        template = chat.template_for(tools=bool(tools))
        assert template is not None  # checked by prompt_of_messages
        try:
            return self.processes.render(
                template,
                tenant=tenant,
                messages=marked(messages),
                tools=marked(list(tools)) or None,
                variables={**chat.variables, **marked(options.variables)},
                add_generation_prompt=options.add_generation_prompt,
                continue_final=options.continue_final,
            )
        except TemplateRefusedError as error:
            raise _refusal(error) from error

    def chunk_ids(self, chunks: Sequence[str], chat: ChatFormat) -> list[tuple[int, ...]]:
        """Ids of each of the consecutive chunks of one `chat_text`, encoded apart as prompt and answer are. Blocks."""
        return [self._encode_marked(chunk, chat.extra, first=place == 0) for place, chunk in enumerate(chunks)]

    def completion_ids(self, prompt: str, completion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a prompt without a template, and of the text that continues it. Blocks."""
        return self._encode(prompt, _NO_EXTRA, True), self._joined([completion], first=False)

    def _refuse_control_keys(self, value: Any, chat: ChatFormat) -> None:
        """Refuses control tokens in property names, which templates write as they write values."""
        if isinstance(value, Mapping):
            for key in value:
                if any(token in key for token in chat.control_tokens):
                    raise InvalidRequestError("A name in `tools` or `tool_calls` holds a control token.", param="tools")
        for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            self._refuse_control_keys(inner, chat)

    def _encode_marked(self, text: str, extra: ExtraTokens, *, first: bool = True) -> tuple[int, ...]:
        """Ids of a rendered prompt. A control token with a break in it is encoded as the text on either side of it."""
        if text.count(BREAK) > MAX_FORGED:
            raise InvalidRequestError(
                f"The messages hold more than {MAX_FORGED} control tokens of this model.", param="messages"
            )
        parts = [part for piece in text.split(BREAK) if piece for part in extra.split(piece)]
        return self._joined(parts, first=first)

    def _joined(self, parts: Sequence[str | int], *, first: bool = True) -> tuple[int, ...]:
        """Ids of texts and tokens that follow each other, and, unless `first`, a text before them."""
        starts = [first and place == 0 for place in range(len(parts))]
        both = list(zip(parts, starts, strict=True))
        encoded = iter(
            self._encode_parts([part if start else f"\n{part}" for part, start in both if isinstance(part, str)])
        )
        ids: list[int] = []
        for part, start in both:
            ids += [part] if isinstance(part, int) else self._without_newline(next(encoded), part, first=start)
        return tuple(ids)

    def _without_newline(self, ids: list[int], text: str, *, first: bool) -> list[int]:
        """Undoes the newline before a part, which keeps tokenizers from adding the space of the start of a text."""
        if first:
            return ids
        length = len(self._newline_ids)
        return ids[length:] if ids[:length] == self._newline_ids else self._encode_parts([text])[0]

    def _encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        # Unlike `encode`, `encode_batch` lets other threads of Python run: a long text does not stop the event loop.
        return [list(found.ids) for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def _encode(self, text: str, extra: ExtraTokens, start_token: bool) -> tuple[int, ...]:
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=start_token)
        ids = tuple(encoding.ids)
        if any(token in text for token in extra.ids):
            start = ids[:1] if self._bos_id is not None and ids[:1] == (self._bos_id,) else ()
            ids = (*start, *self._joined(list(extra.split(text))))
        # a prompt that begins with the start token by itself has it once
        return ids[1:] if self._bos_id is not None and ids[:2] == (self._bos_id, self._bos_id) else ids

    async def _within_limits(self, work: Callable[[], T], tenant: str) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._pool.run(tenant, work)
        except TimeoutError as error:
            raise UnavailableError(
                f"The prompt could not be prepared within {self._timeout_s:g} s. Shorten it or try again.",
                code="prompt_timeout",
                retry_after_s=5,
            ) from error

    # --- text ---------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, extra: ExtraTokens = _NO_EXTRA) -> str:
        """Text with U+FFFD for incomplete characters, and without control tokens unless `skip_special` is False."""
        if not ids:
            return ""
        if extra.tokens:
            return "".join(self._runs(ids, skip_special, extra))
        if len(ids) == 1 and skip_special:
            return self._decode_one(ids[0])
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def _runs(self, ids: Sequence[int], skip_special: bool, extra: ExtraTokens) -> Iterator[str]:
        run: list[int] = []
        for token_id in ids:
            added = extra.by_id.get(token_id)
            if added is None:
                run.append(token_id)
            elif not (added.special and skip_special):
                yield self.decode(run, skip_special=skip_special)
                yield added.text
                run = []
        yield self.decode(run, skip_special=skip_special)

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of a control token."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of one token, which may be an incomplete character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return []
        if match := _BYTE_TOKEN.match(token):
            return [int(match[1], 16)]
        table = _bytes_of_characters()
        if self._byte_level and all(character in table for character in token):
            return [table[character] for character in token]
        return list(self.token_text(token_id).encode())


def _refusal(error: TemplateRefusedError) -> InvalidRequestError:
    message = f"The model's chat template refuses these messages: {str(error)[:300].replace(BREAK, '').rstrip('.')}."
    code = "chat_template_timeout" if isinstance(error, TemplateTimeoutError) else "chat_template_refused"
    return InvalidRequestError(message, param="messages", code=code)


def _with_reasoning(messages: Sequence[Mapping[str, Any]], options: TemplateOptions) -> list[Mapping[str, Any]]:
    """The messages, with reasoning that a client left in an earlier answer where templates expect it."""
    found = [_reasoning_apart(message) for message in messages]
    return [*found[:-1], messages[-1]] if options.continue_final else found


def _reasoning_apart(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] != "assistant" or END not in message["content"] or "reasoning_content" in message:
        return message
    reasoning, content = split_reasoning(message["content"])
    return {**message, "content": content, "reasoning_content": reasoning} if reasoning else message


class _Marker:
    """Puts a break into each control token in the texts of a value, after their first character."""

    def __init__(self, control_tokens: frozenset[str]) -> None:
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            plain = value.replace(BREAK, "") if BREAK in value else value
            return self._tokens.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", plain)
        if isinstance(value, Mapping):
            return {key: self(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(inner) for inner in value]
        return value


def _is_byte_level(backend: Any) -> bool:
    return "ByteLevel" in repr(type(backend.decoder)) or "ByteLevel" in repr(backend.decoder)


def _characters_per_token(backend: Any) -> int:
    """The most characters that one token of a byte-level tokenizer stands for; 0 where a normalizer may shorten texts.

    Each byte of a text is in exactly one token, and a character has at least one byte.
    """
    return 0 if backend.normalizer is not None else max(map(len, backend.get_vocab(with_added_tokens=True)))


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The printable character that byte-level tokenizers use for each byte → the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in table.values()]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
