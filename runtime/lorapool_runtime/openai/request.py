"""A body of `/v1/chat/completions` or `/v1/completions`, parsed once into a frozen request.

Every parameter is bounded; an unknown or unsupported one is refused by name, never ignored. Bounds that depend on the
base (context length, vocabulary) are checked by `encoding`, once the prompts are tokenized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.engines.interface import SamplingParams
from lorapool_runtime.openai.chats.template_options import TemplateOptions, parse_template_options
from lorapool_runtime.openai.json_body import Body, clean_text, printable
from lorapool_runtime.openai.messages import Message, parse_messages
from lorapool_runtime.openai.tools.grammar_spec import GrammarSpec
from lorapool_runtime.openai.tools.tool_choice import ToolChoice, parse_response_format, parse_tools

MAX_N = 8
MAX_SEQUENCES = 64
"""prompts x n of one request."""
MAX_STOPS = 8
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; chat's is all that fits."""

_SHARED = frozenset(
    {
        "model", "stream", "stream_options", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed",
        "stop", "logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "user",
        "ignore_eos", "min_tokens", "response_format", "stop_token_ids", "skip_special_tokens",
        "include_stop_str_in_output",
    }
)  # fmt: skip
_CHAT = _SHARED | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
    "chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message",
}  # fmt: skip
_COMPLETION = _SHARED | {"prompt", "echo"}
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    model: str
    stream: bool
    include_usage: bool
    """A stream ends with a chunk that reports the usage."""
    continuous_usage: bool
    """Every chunk of such a stream reports the usage so far."""
    n: int
    stops: tuple[str, ...]
    max_tokens: int | None
    """None: as many as fit."""
    min_tokens: int
    """The end token cannot be generated before so many."""
    sampling: SamplingParams
    """As the body gives them. `encoding` sets `max_tokens`, each choice's seed and the stop tokens."""
    grammar: GrammarSpec | None
    """Of `response_format`. That of `tools`, which includes it, depends on how the base writes calls."""
    stop_token_ids: frozenset[int]
    """Tokens that end an answer, besides those of the model."""
    skip_special_tokens: bool
    """False: control tokens are part of the text."""
    include_stop: bool
    """True: the stop string, or the text of the token that ended the answer, is part of the text."""

    def own_param(self, param: str) -> str:
        """The name that a parameter has in the body."""
        return param


@dataclass(frozen=True, slots=True)
class ChatRequest(ParsedRequest):
    messages: tuple[Message, ...]
    tools: ToolChoice
    template: TemplateOptions

    @property
    def prompt_param(self) -> str:
        return "messages"

    @property
    def sequences(self) -> int:
        return self.n

    @property
    def prompt_logprobs(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class CompletionRequest(ParsedRequest):
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool

    @property
    def prompt_param(self) -> str:
        return "prompt"

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_logprobs(self) -> int | None:
        """How many of the most likely tokens to report with each prompt token; None: no prompt log-probabilities."""
        return self.sampling.top_logprobs if self.echo else None


def parse_chat(raw: bytes | dict[str, Any]) -> ChatRequest:
    """Parses a chat request, from JSON text or its object. Raises InvalidRequestError naming the parameter at fault."""
    body = Body(raw, _CHAT)
    top_logprobs = body.integer("top_logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
    if body.flag("logprobs"):
        top_logprobs = top_logprobs or 0
    elif top_logprobs is not None:
        body.refuse("top_logprobs", "needs `logprobs` to be true")
    tools = parse_tools(body)
    grammar = _response_format(body)
    if tools.active and body.flag("ignore_eos"):
        body.refuse("ignore_eos", "cannot be combined with `tools`: a constrained answer must be allowed to end")
    max_tokens = body.integer("max_completion_tokens", None, low=1) or body.integer("max_tokens", None, low=1)
    options = _stream_options(body)
    return ChatRequest(
        model=body.text("model"),
        stream=body.flag("stream"),
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
        n=body.integer("n", 1, low=1, high=MAX_N),
        stops=_stops(body),
        max_tokens=max_tokens,
        min_tokens=_min_tokens(body, max_tokens),
        sampling=_sampling(body, top_logprobs),
        grammar=grammar,
        stop_token_ids=_stop_token_ids(body),
        skip_special_tokens=_skips_special_tokens(body),
        include_stop=body.flag("include_stop_str_in_output"),
        messages=parse_messages(body),
        tools=tools,
        template=parse_template_options(body),
    )


def parse_completion(raw: bytes | dict[str, Any]) -> CompletionRequest:
    """Parses a completion request, from JSON text or its object. Raises as `parse_chat`."""
    body = Body(raw, _COMPLETION)
    top_logprobs = body.integer("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
    echo = body.flag("echo")
    max_tokens = body.integer("max_tokens", DEFAULT_COMPLETION_TOKENS, low=0 if echo else 1)
    n = body.integer("n", 1, low=1, high=MAX_N)
    prompts = _prompts(body)
    if len(prompts) * n > MAX_SEQUENCES:
        body.refuse("prompt", f"and `n` ask for {len(prompts) * n} sequences; at most {MAX_SEQUENCES} fit one request")
    options = _stream_options(body)
    return CompletionRequest(
        model=body.text("model"),
        stream=body.flag("stream"),
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
        n=n,
        stops=_stops(body),
        max_tokens=max_tokens,
        min_tokens=_min_tokens(body, max_tokens),
        sampling=_sampling(body, top_logprobs),
        grammar=_response_format(body),
        stop_token_ids=_stop_token_ids(body),
        skip_special_tokens=_skips_special_tokens(body),
        include_stop=body.flag("include_stop_str_in_output"),
        prompts=prompts,
        echo=echo,
    )


# --- single parameters --------------------------------------------------------------------


def _sampling(body: Body, top_logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=0,
        temperature=body.number("temperature", 1.0, low=0.0, high=2.0),
        top_p=body.number("top_p", 1.0, low=0.0, high=1.0, above=True),
        top_k=max(0, body.integer("top_k", 0, low=-1, high=1_000_000)),
        min_p=body.number("min_p", 0.0, low=0.0, high=1.0),
        seed=body.integer("seed", None, low=-(2**63), high=2**63 - 1 - MAX_N),
        presence_penalty=body.number("presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=body.number("frequency_penalty", 0.0, low=-2.0, high=2.0),
        repetition_penalty=body.number("repetition_penalty", 1.0, low=0.0, high=10.0, above=True),
        top_logprobs=top_logprobs,
        ignore_eos=body.flag("ignore_eos"),
        logit_bias=_logit_bias(body),
    )


def _stream_options(body: Body) -> Mapping[str, bool]:
    """The options that are true."""
    options = body.fields.get("stream_options")
    if not options and options in (None, {}):
        return {}
    if not isinstance(options, dict):
        body.refuse("stream_options", "must be an object")
    if not body.flag("stream"):
        body.refuse("stream_options", "is only for `stream: true`")
    for name, value in options.items():
        shown = f"stream_options.{printable(name)}"
        if not isinstance(value, bool | None):
            body.refuse(shown, "must be true or false")
        if value and name == "include_obfuscation":
            body.refuse(shown, "is not supported by this server")
        if value and name not in _STREAM_OPTIONS:
            raise InvalidRequestError(f"Unknown parameter: `{shown}`.", param=shown, code="unknown_parameter")
    return {name: True for name, value in options.items() if value}


def _min_tokens(body: Body, max_tokens: int | None) -> int:
    least: int = body.integer("min_tokens", 0, low=0, high=max_tokens)
    if least and (body.fields.get("response_format") or body.fields.get("tools")):
        body.refuse("min_tokens", "cannot be combined with `response_format` or `tools`, whose answers may have to end")
    return least


def _stops(body: Body) -> tuple[str, ...]:
    value = body.fields.get("stop")
    if value is None or value == "":
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        body.refuse("stop", f"must be a string or a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            body.refuse("stop", f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
        clean_text(stop, "stop")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(body: Body) -> frozenset[int]:
    value = body.fields.get("stop_token_ids")
    if value is None:
        return frozenset()
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKEN_IDS or not _all(value, is_id):
        body.refuse("stop_token_ids", f"must be a list of at most {MAX_STOP_TOKEN_IDS} token ids")
    return frozenset(value)


def _skips_special_tokens(body: Body) -> bool:
    return body.fields.get("skip_special_tokens") is None or body.flag("skip_special_tokens")


def _logit_bias(body: Body) -> Mapping[int, float]:
    value = body.fields.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        body.refuse("logit_bias", f"must be an object of at most {MAX_LOGIT_BIAS} token ids")
    result: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            body.refuse("logit_bias", "must have token ids (whole numbers as strings) as keys")
        if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not -100 <= bias <= 100:
            body.refuse("logit_bias", "must have numbers between -100 and 100 as values")
        result[int(key)] = float(bias)
    return result


def _response_format(body: Body) -> GrammarSpec | None:
    grammar = parse_response_format(body)
    if grammar is not None and body.flag("ignore_eos"):
        body.refuse(
            "ignore_eos", "cannot be combined with `response_format`: a constrained answer must be allowed to end"
        )
    return grammar


# --- prompts -----------------------------------------------------------------------------


def _prompts(body: Body) -> tuple[str | tuple[int, ...], ...]:
    """A string, a list of ids, a list of strings, or a list of lists of ids."""
    value = body.fields.get("prompt")
    if isinstance(value, str):
        return (_prompt_text(body, value),)
    if not isinstance(value, list) or not value:
        body.refuse("prompt", "must be a string, a list of strings, a list of token ids or a list of such lists")
    if _all(value, is_id):
        return (tuple(value),)
    if len(value) > MAX_SEQUENCES:
        body.refuse("prompt", f"may hold at most {MAX_SEQUENCES} prompts")
    prompts: list[str | tuple[int, ...]] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(_prompt_text(body, item))
        elif isinstance(item, list) and item and _all(item, is_id):
            prompts.append(tuple(item))
        else:
            body.refuse("prompt", "must hold non-empty strings or non-empty lists of token ids")
    return tuple(prompts)


def _prompt_text(body: Body, value: str) -> str:
    if not value:
        body.refuse("prompt", "must not be empty")
    return clean_text(value, "prompt")


def is_id(value: Any) -> bool:
    """True for a number that may be the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _all(values: list[Any], test: Callable[[Any], bool]) -> bool:
    return all(test(value) for value in values)
