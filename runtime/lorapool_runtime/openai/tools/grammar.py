"""Grammars as token masks, by llguidance: compiled in a thread of their own, with limits, and cached.

Each sequence has its own copy of the matcher, which the engine's thread queries. The library stops at the limits
below, while compiling and at every token: a grammar that exceeds them is refused (400), and one that exceeds them
while generating ends its own request only.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lorapool_api.openai import CODE_QUEUE_FULL, InvalidRequestError, TooManyRequestsError, UnavailableError
from lorapool_runtime.engines.interface import ConstraintError, TokenConstraint
from lorapool_runtime.openai.json_body import printable
from lorapool_runtime.openai.tools.grammar_spec import JSON_STYLE, GrammarSpec, SchemaPart
from lorapool_runtime.openai.tools.relaxation import relaxed

_CACHED = 64
_MAX_PENDING = 64
NAMED_PATHS = 10
"""Keywords that an error message names at most."""
_LIMITS: Mapping[str, Any] = {
    "max_grammar_size": 100_000,  # symbols
    "initial_lexer_fuel": 500_000,  # about 10 ms
    "step_lexer_fuel": 100_000,  # about 7 ms a token at the very most; 0.1 ms is usual
    "step_max_items": 20_000,  # about 1 ms
    "max_lexer_states": 50_000,  # at most 100 MB a sequence; hundreds are usual
    "verbose_errors": False,
}


class CompiledGrammar:
    """`interface.Grammar`."""

    def __init__(
        self,
        text: str,
        matcher: LLMatcher,
        *,
        is_schema: bool,
        relaxed: tuple[str, ...] = (),
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.text = text
        self.is_schema = is_schema
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self.relaxed = relaxed
        """Where its schemas have keywords that are not enforced: parameter and path of each."""

    def constraint(self, end_ids: frozenset[int] = frozenset()) -> TokenConstraint:
        """A new constraint for one sequence, with its own state. `end_ids` may end it wherever it may end."""
        return _Constraint(self._matcher.deep_copy(), self._eos_token_ids, end_ids - self._eos_token_ids)


class _Constraint:
    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int], further_ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._further_ends = further_ends

    def mask(self) -> bytes:
        bits: bytes = self._matcher.compute_bitmask()
        self._raise_if_failed()
        if self._further_ends and any(bits[end // 8] >> end % 8 & 1 for end in self._eos_token_ids):
            return _with(bits, self._further_ends)
        return bits

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._raise_if_failed()

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _raise_if_failed(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar of this answer failed: {_reason(self._matcher.get_error())}")


def _with(bits: bytes, token_ids: Iterable[int]) -> bytes:
    changed = bytearray(bits)
    for token_id in token_ids:
        if token_id // 8 < len(changed):
            changed[token_id // 8] |= 1 << token_id % 8
    return bytes(changed)


class GrammarCompiler:
    """Compiles in one worker thread, which first prepares the tokenizer (a second for a large vocabulary)."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Iterable[int], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._pending = 0
        self._cache: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()  # used by the worker thread only
        self._tokenizer: Future[LLTokenizer] = self._pool.submit(
            _make_tokenizer, tokenizer_json, vocab_size, sorted(self._eos_token_ids)
        )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compiles a grammar, or returns it from the cache.

        Raises InvalidRequestError for an unsupported one, UnavailableError or TooManyRequestsError under load.
        """
        if self._pending >= _MAX_PENDING:
            raise TooManyRequestsError(
                f"{self._pending} grammars already wait to be compiled; the maximum is {_MAX_PENDING}.",
                code=CODE_QUEUE_FULL,
                retry_after_s=1,
            )
        self._pending += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, self._compiled, spec)
        except TimeoutError as error:
            raise UnavailableError(
                f"The grammar of `{spec.param}` could not be compiled within {self._timeout_s:g} s. Try again.",
                code="grammar_timeout",
                retry_after_s=5,
            ) from error
        finally:
            self._pending -= 1

    # --- the worker thread ----------------------------------------------------------------

    def _compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        if spec in self._cache:
            self._cache.move_to_end(spec)
            return self._cache[spec]
        grammar = self._cache[spec] = self._grammar(spec)
        if len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return grammar

    def _grammar(self, spec: GrammarSpec) -> CompiledGrammar:
        is_schema = not spec.lark
        unenforced: tuple[str, ...] = ()
        text = spec.text([part.schema for part in spec.parts])
        matcher = self._matcher(text, is_schema=is_schema)
        if matcher.is_error():
            parts = [self._relaxed(part) for part in spec.parts]
            text = spec.text([schema for schema, _ in parts])
            matcher = self._matcher(text, is_schema=is_schema)
            unenforced = tuple(path for _, dropped in parts for path in dropped)
        if matcher.is_error():
            raise _refusal(spec.param, matcher.get_error())
        return CompiledGrammar(
            text, matcher, is_schema=is_schema, relaxed=unenforced, eos_token_ids=self._eos_token_ids
        )

    def _relaxed(self, part: SchemaPart) -> tuple[str, tuple[str, ...]]:
        """The schema that is enforced for this one, and where it has less. Raises InvalidRequestError."""
        error = self._error(part.schema)
        if not error:
            return part.schema, ()
        made, dropped = relaxed(json.loads(part.schema), lambda schema: bool(self._error(json.dumps(schema))))
        if part.strict:
            raise _refusal(part.param, error, dropped)
        text = json.dumps(made, ensure_ascii=False)
        if error := self._error(text):
            raise _refusal(part.param, error)
        return text, tuple(f"{part.param}.{path}" for path in dropped)

    def _error(self, schema: str) -> str:
        """Why the library refuses a schema; empty if it does not."""
        return self._matcher(schema, is_schema=True).get_error()

    def _matcher(self, text: str, *, is_schema: bool) -> LLMatcher:
        try:
            tokenizer = self._tokenizer.result()
        except Exception as error:
            raise InvalidRequestError(
                "This base model's tokenizer does not support grammars: send neither `response_format` nor `tools`.",
                code="unsupported_parameter",
            ) from error
        grammar = json_grammar(text) if is_schema else text
        return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))


def _refusal(param: str, message: str, unenforceable: tuple[str, ...] = ()) -> InvalidRequestError:
    """`unenforceable`: the paths of the keywords that are the reason."""
    where = ", ".join(f"`{printable(path)}`" for path in unenforceable[:NAMED_PATHS])
    remedy = f" Leave out {where}, or do not set `strict`." if where else ""
    return InvalidRequestError(
        f"The schema in `{param}` cannot be used: {_reason(message)}{remedy}", param=param, code="unsupported_schema"
    )


def json_grammar(schema: str) -> str:
    """The library's grammar text for a JSON schema. Unsupported keywords are errors, not ignored."""
    options: Any = {**JSON_STYLE, "lenient": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


def _make_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    count = len(json.loads(tokenizer_json)["model"]["vocab"])
    return LLTokenizer(tokenizer_json, n_vocab=max(vocab_size, count), eos_token=eos_token_ids or None)


def _reason(message: str) -> str:
    """The first line of the library's message, and where that only announces an error, the last one too."""
    lines = [line.strip() for line in message.strip().split("\n")]
    shown = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{shown[:300].rstrip('.')}."
