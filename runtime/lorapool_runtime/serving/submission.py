"""From a parsed request to what the engine is asked for: prompts as token ids, one engine request per answer.

`service` calls it before anything is waited for, so that a request beyond the base's bounds is refused at once. It
starts nothing; what belongs to the adapter, slot and salt, is given last, when the adapter is there.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lorapool_api.openai import InvalidRequest
from lorapool_runtime.engines.interface import GenerationRequest, ModelFacts
from lorapool_runtime.openai.detokenizer import EchoedPrompt
from lorapool_runtime.openai.grammar import Grammar
from lorapool_runtime.openai.grammar_spec import GrammarSpec
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest, sampling_params
from lorapool_runtime.openai.tool_format import ToolFormat
from lorapool_runtime.openai.tools import tools_grammar

SequenceMaker = Callable[[int, str], GenerationRequest]
"""Slot and salt -> the engine's request."""


class TextCodec(Protocol):
    """What the runtime asks of a tokenizer; `tokenizer.Tokenizer` is the one."""

    eos_token_ids: frozenset[int]

    tool_format: ToolFormat

    async def prompt_of_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]: ...
    async def prompt_of_text(self, text: str) -> tuple[int, ...]: ...
    async def echo(self, token_ids: Sequence[int]) -> EchoedPrompt: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> list[int]: ...
    def close(self) -> None: ...


async def prompts_of(
    request: ChatRequest | CompletionRequest, codec: TextCodec, facts: ModelFacts
) -> tuple[tuple[int, ...], ...]:
    """Raises InvalidRequest."""
    if isinstance(request, ChatRequest):
        tools = [tool.definition for tool in request.tools.offered]
        return (await codec.prompt_of_messages(request.messages, tools),)
    prompts = []
    for prompt in request.prompts:
        ids = await codec.prompt_of_text(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidRequest("The prompt has no tokens.", param="prompt")
        if max(ids) >= facts.vocab_size:
            raise InvalidRequest(
                f"The prompt names token {max(ids)}, but the vocabulary has {facts.vocab_size} tokens.",
                param="prompt",
            )
        prompts.append(ids)
    return tuple(prompts)


def grammar_of(request: ChatRequest | CompletionRequest, codec: TextCodec) -> GrammarSpec | None:
    """What every answer of the request must follow, if anything."""
    if isinstance(request, ChatRequest) and request.tools.active:
        return tools_grammar(request.tools, codec.tool_format)
    return request.grammar


def sequences_of(
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
    grammar: Grammar | None,
    codec: TextCodec,
    facts: ModelFacts,
) -> list[SequenceMaker]:
    """`n` per prompt, in the order of the answer's choices. Raises InvalidRequest beyond the base's bounds."""
    internal = uuid.uuid4().hex

    def make(number: int, prompt: tuple[int, ...]) -> SequenceMaker:
        params = sampling_params(
            request,
            prompt_tokens=len(prompt),
            prompt_param=request.prompt_param,
            choice=number % request.n,
            sequences=len(prompts) * request.n,
            facts=facts,
            stop_token_ids=codec.eos_token_ids,
        )
        return lambda slot, salt: GenerationRequest(
            f"{internal}-{number}",
            prompt,
            slot,
            salt,
            params,
            prompt_logprobs=request.prompt_logprobs,
            constraint=None if grammar is None else grammar.constraint(),
        )

    return [make(place * request.n + choice, prompt) for place, prompt in enumerate(prompts)
            for choice in range(request.n)]  # fmt: skip
