"""Bodies of `/tokenize` and `/detokenize`, in the form that vLLM gave them, and their answers. Pure.

A prompt, or a conversation, is parsed as a completion or a chat is, so that it becomes the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorapool_runtime.openai.json_body import Body, parse_json_object
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest, is_id, parse_chat, parse_completion

MAX_TOKENS = 131_072
"""Tokens of one request to /detokenize."""


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    prompt: ChatRequest | CompletionRequest
    start_token: bool
    """Whether a prompt begins with the start token, if the base has one. A chat's template writes its own."""
    with_texts: bool
    """The answer has the text of each token too."""


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    model: str
    token_ids: tuple[int, ...]


def parse_tokenize(raw: bytes) -> TokenizeRequest:
    """Raises InvalidRequestError naming the parameter at fault."""
    given = parse_json_object(raw, constants=True)
    own: dict[str, Any] = {
        name: given.pop(name) for name in ("return_token_strs", "add_special_tokens") if name in given
    }
    body = Body(own, frozenset(own))
    start_token, with_texts = _start_token(body, chat="messages" in given), body.flag("return_token_strs")
    if "messages" in given:
        return TokenizeRequest(parse_chat(given), start_token, with_texts)
    if not isinstance(given.get("prompt"), str):
        body.refuse("prompt", "must be a string; send `messages` for a conversation")
    return TokenizeRequest(parse_completion(given), start_token, with_texts)


def parse_detokenize(raw: bytes) -> DetokenizeRequest:
    """Raises InvalidRequestError naming the parameter at fault."""
    body = Body(raw, frozenset({"model", "tokens"}))
    tokens = body.fields.get("tokens")
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS or not all(map(is_id, tokens)):
        body.refuse("tokens", f"must be a list of at most {MAX_TOKENS} token ids")
    return DetokenizeRequest(body.text("model"), tuple(tokens))


def tokenized(token_ids: Sequence[int], texts: Sequence[str] | None, max_model_len: int) -> dict[str, Any]:
    """The body of an answer of /tokenize."""
    return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts}


def detokenized(text: str) -> dict[str, Any]:
    """The body of an answer of /detokenize."""
    return {"prompt": text}


def _start_token(body: Body, *, chat: bool) -> bool:
    if body.fields.get("add_special_tokens") is None:
        return not chat
    wanted = body.flag("add_special_tokens")
    if wanted and chat:
        body.refuse("add_special_tokens", "is false for `messages`: the chat template writes the control tokens")
    return wanted
