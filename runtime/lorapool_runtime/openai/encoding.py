"""Encodes a parsed request for the base: prompts as token ids, sampling parameters, a compiled grammar.

This is done before a request waits for anything, so that a request beyond the base's bounds is refused at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.engines.interface import ModelFacts, SamplingParams
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.chats.tokenizer import ChatPrompt, Decoder, Tokenizer
from lorapool_runtime.openai.detokenizer import EchoedPrompt
from lorapool_runtime.openai.reasoning import ReasoningStart
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest
from lorapool_runtime.openai.stops import Stops, stops_of
from lorapool_runtime.openai.tools.grammar import CompiledGrammar, GrammarCompiler
from lorapool_runtime.openai.tools.grammar_spec import GrammarSpec
from lorapool_runtime.openai.tools.tool_choice import tools_grammar

MAX_REQUEST_TOKENS = 65_536
"""Completion tokens that one request may ask for (sequences x max_tokens), or one context where that is more: beyond
it one caller would occupy the whole queue."""
MAX_WHOLE_LOGPROBS = 200_000
"""Log-probabilities of an answer that is not streamed: 20 MB of JSON, which is made at once and is in memory whole."""


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]
    """One per sequence: `n` per prompt, in the order of the response's choices."""
    grammar: CompiledGrammar | None
    echo: tuple[EchoedPrompt, ...]
    """One per prompt when the request asks for it, else empty."""
    stops: Stops
    decoder: Decoder
    chat: ChatFormat
    reasoning: ReasoningStart = ReasoningStart.NONE


async def encode(
    request: ChatRequest | CompletionRequest,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    grammars: GrammarCompiler,
    facts: ModelFacts,
    tenant: str,
) -> EncodedRequest:
    """Encodes a request for the base, or for an adapter with its own chat format.

    Raises InvalidRequestError beyond the base's bounds, UnavailableError or TooManyRequestsError under load.
    """
    stops = stops_of(request, chat, facts.vocab_size)
    found = await prompts_of(request, tokenizer, chat, facts, tenant)
    prompts = tuple(prompt.ids for prompt in found)
    spec = _grammar_spec(request, chat)
    grammar = None if spec is None else await grammars.compile(spec)
    share = _share_of_logprobs(request, prompts)
    sampling = tuple(
        _sampling(request, len(prompt), choice, len(prompts) * request.n, share, stops.token_ids, facts)
        for prompt in prompts
        for choice in range(request.n)
    )
    decoder = Decoder(tokenizer, chat.extra, request.skip_special_tokens)
    echo: tuple[EchoedPrompt, ...] = ()
    if isinstance(request, CompletionRequest) and request.echo:
        echo = tuple([await tokenizer.echo(prompt, decode=decoder, tenant=tenant) for prompt in prompts])
    reasoning = ReasoningStart.NONE if _begins_with_grammar(request) else found[0].reasoning
    return EncodedRequest(prompts, sampling, grammar, echo, stops, decoder, chat, reasoning)


async def prompts_of(
    request: ChatRequest | CompletionRequest,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    facts: ModelFacts,
    tenant: str,
    *,
    start_token: bool = True,
) -> tuple[ChatPrompt, ...]:
    """The token ids of a request's prompts. `start_token`: whether a prompt without a template begins with one.

    Raises InvalidRequestError beyond the base's bounds, UnavailableError under load.
    """
    if isinstance(request, ChatRequest):
        texts = "".join(message["content"].strip() for message in request.messages if message["role"] == "user")
        _refuse_beyond_context(tokenizer.least_tokens(texts), facts.max_model_len, request.prompt_param)
        tools = [tool.definition for tool in request.tools.offered]
        return (
            await tokenizer.prompt_of_messages(
                request.messages, tools, chat=chat, options=request.template, tenant=tenant
            ),
        )
    prompts = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            _refuse_beyond_context(tokenizer.least_tokens(prompt), facts.max_model_len, request.prompt_param)
            ids = await tokenizer.prompt_of_text(prompt, extra=chat.extra, start_token=start_token, tenant=tenant)
        else:
            ids = prompt
        if not ids:
            raise InvalidRequestError("The prompt has no tokens.", param="prompt")
        refuse_unknown_tokens(ids, facts, "prompt")
        prompts.append(ChatPrompt(ids))
    return tuple(prompts)


def refuse_unknown_tokens(token_ids: Sequence[int], facts: ModelFacts, param: str) -> None:
    """Raises InvalidRequestError for an id beyond the vocabulary."""
    if (highest := max(token_ids, default=0)) >= facts.vocab_size:
        raise InvalidRequestError(
            f"`{param}` names token {highest}, but the vocabulary has {facts.vocab_size} tokens.", param=param
        )


def _refuse_beyond_context(least_tokens: int, max_model_len: int, param: str) -> None:
    """Refuses a text that is too long however it is tokenized, before that costs anything.

    A chat template may drop parts of a conversation, but not what its user says.
    """
    if least_tokens > max_model_len:
        raise InvalidRequestError(
            f"This model's context is {max_model_len} tokens, but the prompt has at least {least_tokens}. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _begins_with_grammar(request: ChatRequest | CompletionRequest) -> bool:
    """Whether a grammar holds from the first token on, which leaves no room for reasoning."""
    return request.grammar is not None or (isinstance(request, ChatRequest) and request.tools.mode == "required")


def _grammar_spec(request: ChatRequest | CompletionRequest, chat: ChatFormat) -> GrammarSpec | None:
    if isinstance(request, ChatRequest) and request.tools.active:
        return tools_grammar(request.tools, chat.shape.tools, request.grammar)
    return request.grammar


def _sampling(
    request: ChatRequest | CompletionRequest,
    prompt_tokens: int,
    choice: int,
    sequences: int,
    share_of_logprobs: int,
    stop_token_ids: frozenset[int],
    facts: ModelFacts,
) -> SamplingParams:
    """The engine's parameters of one sequence."""
    given = request.sampling
    max_tokens = _max_tokens(request.max_tokens, request.prompt_param, prompt_tokens, sequences, facts.max_model_len)
    if request.max_tokens is not None and max_tokens > share_of_logprobs:
        raise _too_many_logprobs()
    if given.logit_bias and max(given.logit_bias) >= facts.vocab_size:
        raise InvalidRequestError(
            f"`logit_bias` names token {max(given.logit_bias)}, but the vocabulary has {facts.vocab_size} tokens.",
            param="logit_bias",
        )
    return replace(
        given,
        max_tokens=min(max_tokens, share_of_logprobs),
        min_tokens=request.min_tokens,
        seed=None if given.seed is None else given.seed + choice,
        stop_token_ids=stop_token_ids,
    )


def _share_of_logprobs(request: ChatRequest | CompletionRequest, prompts: tuple[tuple[int, ...], ...]) -> int:
    """Completion tokens of one sequence whose log-probabilities fit into one whole answer.

    Raises InvalidRequestError when those of the echoed prompts do not.
    """
    top_logprobs = request.sampling.top_logprobs
    if request.stream or top_logprobs is None:
        return sys.maxsize
    echoed = 0 if request.prompt_logprobs is None else request.n * sum(map(len, prompts))
    left = MAX_WHOLE_LOGPROBS // (1 + top_logprobs) - echoed
    if left < 0:
        raise _too_many_logprobs()
    return left // (request.n * len(prompts))


def _too_many_logprobs() -> InvalidRequestError:
    return InvalidRequestError(
        f"The answer could hold more than {MAX_WHOLE_LOGPROBS} log-probabilities. Set `stream` to true, or ask for "
        "fewer tokens, choices or log-probabilities of each token.",
        param="logprobs",
    )


def _max_tokens(wanted: int | None, prompt_param: str, prompt_tokens: int, sequences: int, max_model_len: int) -> int:
    """Completion tokens of one sequence: `wanted`, or as many as fit the context if that is less."""
    room = max_model_len - prompt_tokens
    if room < (0 if wanted == 0 else 1):
        raise InvalidRequestError(
            f"This model's context is {max_model_len} tokens, but the prompt alone has {prompt_tokens}. Shorten it.",
            param=prompt_param,
            code="context_length_exceeded",
        )
    budget = max(MAX_REQUEST_TOKENS, max_model_len)
    share = budget // sequences
    if wanted is None:
        return min(room, share)
    granted = min(wanted, room)
    if granted > share:
        raise InvalidRequestError(
            f"{sequences} sequences of `max_tokens` {granted} are {sequences * granted} tokens; "
            f"one request may ask for {budget}, so `max_tokens` may be at most {share}.",
            param="max_tokens",
        )
    return granted
