"""The base's tokenizer and chat template, run off the event loop and with a time limit.

Only the base's template is rendered, never a client's or an adapter's; transformers renders it in jinja's immutable
sandbox. Control tokens inside message texts are encoded as plain text, so no client can forge a turn. Slow (Python)
tokenizers are refused.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from lorapool_api.openai import InvalidRequestError, UnavailableError
from lorapool_runtime.openai.detokenizer import EchoedPrompt, echo_prompt
from lorapool_runtime.openai.fair_pool import FairPool
from lorapool_runtime.openai.tool_format import PLAIN, infer_format, plain_messages

T = TypeVar("T")

ONE_TOKEN_TEXTS = 16 * 1024
"""Cached texts of single tokens: about 2 MB, and nearly all the tokens that a language uses."""
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")


class TokenizerError(Exception):
    """The folder has no usable tokenizer; the message says why."""


class Tokenizer:
    """Prompts to ids and ids to text.

    What is awaited runs in worker threads, of which each tenant has a share; the rest is fast and thread-safe.
    """

    def __init__(self, folder: Path, *, threads: int, timeout_s: float) -> None:
        from transformers import AutoTokenizer  # takes seconds, so not at the top of the module

        try:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{folder} has no tokenizer that transformers can read: {error}") from error
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(f"{folder}: the tokenizer has no tokenizer.json; only fast tokenizers are used")
        self._inner: Any = inner
        self._backend: Any = backend
        self._timeout_s = timeout_s
        self._local = threading.local()
        self._pool = FairPool(threads, "tokenize")
        self._byte_level = _is_byte_level(backend)
        # Cached, because every step of every stream decodes its last token alone.
        self._decode_one = functools.lru_cache(ONE_TOKEN_TEXTS)(
            lambda token_id: str(backend.decode([token_id], skip_special_tokens=True))
        )
        self._control_tokens = frozenset(
            token.content for token in inner.added_tokens_decoder.values() if token.special
        )
        self._characters_per_token = _characters_per_token(backend) if self._byte_level else 0
        self.has_chat_template = bool(inner.chat_template)
        eos = inner.eos_token_id
        self.eos_token_ids = frozenset([eos] if isinstance(eos, int) else [])
        self.tool_format = infer_format(self._probe, sorted(self._control_tokens)) if inner.chat_template else PLAIN

    def close(self) -> None:
        self._pool.close()

    # --- prompts ------------------------------------------------------------------------

    def grammar_json(self) -> str:
        """The tokenizer as JSON text, for the grammar library."""
        text: str = self._own_copy().backend_tokenizer.to_str()
        return text

    async def prompt_of_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, tenant: str = ""
    ) -> tuple[int, ...]:
        """Ids of a conversation, up to the beginning of the assistant's turn.

        Raises InvalidRequestError for what the template refuses, UnavailableError after the timeout.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "This base model has no chat template: it is not made for chat. "
                "Send a `prompt` to /v1/completions instead.",
                param="messages",
                code="no_chat_template",
            )
        return await self._within_limits(functools.partial(self._render, messages, tools), tenant)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text, without tokenizing it; 0 where none is known."""
        return -(-len(text) // self._characters_per_token) if self._characters_per_token else 0

    async def prompt_of_text(self, text: str, *, tenant: str = "") -> tuple[int, ...]:
        """Ids of a prompt without a template, with the start token if the base has one. Raises UnavailableError."""
        return await self._within_limits(functools.partial(self._encode, text), tenant)

    async def echo(self, token_ids: Sequence[int], *, tenant: str = "") -> EchoedPrompt:
        """The decoded prompt, for a response that begins with it. Raises UnavailableError."""
        return await self._within_limits(functools.partial(echo_prompt, self.decode, token_ids), tenant)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if not self.tool_format.native:
            messages, tools = plain_messages(messages, tools), ()
        self._refuse_control_keys([*messages, *tools])
        try:
            ids = self._own_copy().apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"The base model's chat template refuses these messages: {str(error)[:300]}",
                param="messages",
                code="chat_template_refused",
            ) from error
        return tuple(int(item) for item in ids)

    def _probe(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        text: str = self._inner.apply_chat_template(list(messages), tools=tools, tokenize=False)
        return text

    def _refuse_control_keys(self, value: Any) -> None:
        """Refuses control tokens in property names, which transformers does not encode as text as it does in values."""
        if isinstance(value, Mapping):
            for key in value:
                if any(token in key for token in self._control_tokens):
                    raise InvalidRequestError("A name in `tools` or `tool_calls` holds a control token.", param="tools")
        for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            self._refuse_control_keys(inner)

    def _encode(self, text: str) -> tuple[int, ...]:
        # Unlike `encode`, `encode_batch` lets other threads of Python run: a long text does not stop the event loop.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=True)
        return tuple(encoding.ids)

    def _own_copy(self) -> Any:
        """The calling thread's copy of the tokenizer, whose calls change internal settings."""
        mine = getattr(self._local, "tokenizer", None)
        if mine is None:
            mine = self._local.tokenizer = copy.deepcopy(self._inner)
        return mine

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens, with U+FFFD for incomplete characters."""
        if not ids:
            return ""
        if len(ids) == 1:
            return self._decode_one(ids[0])
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

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
