"""What ends the answers to one request: token ids for the engine, and texts that are looked for in the answer. Pure.

A control token is not part of an answer's text, so a stop string that is one is looked for as a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.chats.chat_format import ChatFormat
from lorapool_runtime.openai.request import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True)
class Stops:
    token_ids: frozenset[int]
    texts: tuple[str, ...]
    included: bool
    """The text that ended an answer is part of it."""


def stops_of(request: ChatRequest | CompletionRequest, chat: ChatFormat, vocab_size: int) -> Stops:
    """Raises InvalidRequestError for a token that the model does not have, or a stop that could never be found."""
    for token_id in request.stop_token_ids:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"`stop_token_ids` names token {token_id}, but the vocabulary has {vocab_size} tokens.",
                param="stop_token_ids",
            )
    tokens = request.stop_token_ids | (frozenset() if request.sampling.ignore_eos else chat.stop_ids)
    texts = []
    for stop in request.stops:
        token = _token_of(stop, chat) if request.skip_special_tokens else None
        if token is None:
            texts.append(stop)
        else:
            tokens |= {token}
    return Stops(tokens, tuple(texts), request.include_stop)


def _token_of(stop: str, chat: ChatFormat) -> int | None:
    """The control token with which a stop string begins: what follows it is never generated. None for plain text."""
    held = [text for text in chat.special_ids if text in stop]
    begins = max((text for text in held if stop.startswith(text)), key=len, default=None)
    if held and begins is None:
        raise InvalidRequestError(
            f"`stop` holds the control token {held[0]} after other text, and control tokens are not part of the text. "
            "Name the token alone, or set `skip_special_tokens` to false.",
            param="stop",
        )
    return None if begins is None else chat.special_ids[begins]
