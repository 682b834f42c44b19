"""Answers `/tokenize` and `/detokenize` with the tokens that a request to the same model would have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorapool_runtime.openai.encoding import prompts_of, refuse_unknown_tokens
from lorapool_runtime.openai.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenized,
    tokenized,
)
from lorapool_runtime.serving.caller import Caller
from lorapool_runtime.serving.service import Runtime


class Tokenized(NamedTuple):
    body: Mapping[str, Any]
    target: str
    """For the response header, as in `AdmittedRequest`."""


async def tokenize(runtime: Runtime, request: TokenizeRequest, header: str | None, caller: Caller) -> Tokenized:
    """The tokens of a prompt. Loads an adapter that is not loaded, whose files may say how it is written.

    Raises InvalidRequestError for a prompt that would be refused otherwise too, and ApiError under load.
    """
    async with runtime.named_model(request.prompt.model, header, caller) as model:
        base = model.base
        (prompt,) = await prompts_of(
            request.prompt,
            base.tokenizer,
            model.chat,
            base.engine.facts,
            caller.tenant,
            start_token=request.start_token,
        )
        texts = None
        if request.with_texts:
            texts = [base.tokenizer.vocabulary_text(token_id, model.chat.extra) for token_id in prompt.ids]
        return Tokenized(tokenized(prompt.ids, texts, base.engine.facts.max_model_len), model.target)


async def detokenize(runtime: Runtime, request: DetokenizeRequest, header: str | None, caller: Caller) -> Tokenized:
    """The text of tokens, with that of control tokens. Raises InvalidRequestError, and ApiError under load."""
    async with runtime.named_model(request.model, header, caller) as model:
        refuse_unknown_tokens(request.token_ids, model.base.engine.facts, "tokens")
        text = await model.base.tokenizer.text_of(request.token_ids, extra=model.chat.extra, tenant=caller.tenant)
        return Tokenized(detokenized(text), model.target)
