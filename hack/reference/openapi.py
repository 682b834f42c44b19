"""The OpenAPI document of the gateway, made of what the parsers of the runtime accept.

Types and bounds of plain parameters are those with which the parser reads them; the nested ones are written here, with
the parser's own bounds. Both are compared with the server by `tests/gateway/test_openapi.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorapool_api import openai, protocol
from lorapool_runtime.openai import json_body, messages, request, tokenization
from lorapool_runtime.openai.chats import template_options
from lorapool_runtime.openai.tools import tool_choice
from reference import texts, tuning_paths
from reference.parameters import RecordingBody, parsed_bodies

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
EVENTS: Schema = {"description": "Server-sent events; each `data` is a chunk as JSON, or `[DONE]`."}
ANY_OBJECT: Schema = {"type": "object"}
TOKEN_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_.:/-]{1,128}$"}
FUNCTION: Schema = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": NAME,
        "description": TEXT,
        "parameters": {"type": ["object", "null"], "properties": {"type": {"const": "object"}}},
        "strict": {"type": ["boolean", "null"]},
    },
}


def one_of(kind: str, **properties: Schema) -> Schema:
    """An object with a fixed `type` and the given members, all required."""
    own = {"type": {"const": kind}, **properties}
    return {"type": "object", "required": list(own), "additionalProperties": False, "properties": own}


CALL = {**one_of("function", id=TEXT, function={"type": "object", "required": ["name"],
        "properties": {"name": {"type": "string", "minLength": 1}, "arguments": {}}})}  # fmt: skip
CONTENT: Schema = {
    "anyOf": [TEXT, {"type": "array", "items": {"type": "object", "required": ["type", "text"],
              "properties": {"type": {"const": "text"}, "text": TEXT}}}]
}  # fmt: skip


OR_NULL: Schema = {"anyOf": [*CONTENT["anyOf"], {"type": "null"}]}
SAID: Schema = {"type": ["string", "null"]}


def message(roles: list[str], required: list[str], **more: Schema) -> Schema:
    own = {"role": {"enum": roles}, "content": CONTENT, "name": TEXT, **more}
    return {"type": "object", "required": ["role", *required], "additionalProperties": False, "properties": own}


MESSAGE: Schema = {
    "anyOf": [
        message([role for role in messages.ROLES if role not in ("assistant", "tool", "function")], ["content"]),
        message(
            ["assistant"],
            [],
            content=OR_NULL,
            tool_calls={"anyOf": [{"type": "array", "items": CALL}, {"type": "null"}]},
            refusal=SAID,
            **dict.fromkeys(messages.REASONING_FIELDS, SAID),
        ),
        message(["tool", "function"], [], content=OR_NULL, tool_call_id=SAID),
    ]
}
MESSAGES: Schema = {"type": "array", "minItems": 1, "maxItems": messages.MAX_MESSAGES, "items": MESSAGE}
NESTED: Mapping[str, Schema] = {
    "model": {"type": "string", "minLength": 1},
    "messages": {"$ref": "#/components/schemas/Messages"},
    "prompt": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            TOKEN_IDS,
            {
                "type": "array",
                "minItems": 1,
                "maxItems": request.MAX_SEQUENCES,
                "items": {"anyOf": [{"type": "string", "minLength": 1}, TOKEN_IDS]},
            },
        ]
    },
    "stream_options": {
        "type": "object",
        "additionalProperties": {"enum": [False, None]},
        "properties": {
            **{name: {"type": ["boolean", "null"]} for name in request._STREAM_OPTIONS},
            "include_obfuscation": {"enum": [False, None]},
        },
    },
    "stop": {
        "anyOf": [
            {"type": "string", "maxLength": request.MAX_STOP_CHARS},
            {
                "type": "array",
                "maxItems": request.MAX_STOPS,
                "items": {"type": "string", "minLength": 1, "maxLength": request.MAX_STOP_CHARS},
            },
        ]
    },
    "stop_token_ids": {**TOKEN_IDS, "minItems": 0, "maxItems": request.MAX_STOP_TOKEN_IDS},
    "chat_template_kwargs": {
        "type": "object",
        "maxProperties": template_options.MAX_KWARGS,
        "propertyNames": {"enum": ["enable_thinking", "thinking", "documents"]},
    },
    "reasoning_effort": {"enum": list(template_options.REASONING_EFFORTS)},
    "logit_bias": {
        "type": "object",
        "maxProperties": request.MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "user": {},
    "response_format": {
        "anyOf": [
            one_of("text"),
            one_of("json_object"),
            one_of(
                "json_schema",
                json_schema={
                    "type": "object",
                    "required": ["name", "schema"],
                    "additionalProperties": False,
                    "properties": {
                        "name": NAME,
                        "schema": ANY_OBJECT,
                        "strict": {"type": ["boolean", "null"]},
                        "description": TEXT,
                    },
                },
            ),
        ]
    },
    "tools": {"type": "array", "maxItems": tool_choice.MAX_TOOLS, "items": one_of("function", function=FUNCTION)},
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            one_of("function", function={"type": "object", "required": ["name"], "properties": {"name": NAME}}),
        ]
    },
    "parallel_tool_calls": {"type": "boolean"},
    "skip_special_tokens": {"type": "boolean"},
    "add_generation_prompt": {"type": "boolean"},
}
REQUIRED = {"model", "messages", "prompt"}
PARTS: Schema = {
    "anyOf": [TEXT, {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["type", "text"],
              "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": TEXT}}}]
}  # fmt: skip
INPUT: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["role", "content"],
                        "properties": {
                            "type": {"const": "message"},
                            "role": {"enum": ["system", "developer", "user", "assistant"]},
                            "content": PARTS,
                        },
                    },
                    one_of("function_call", call_id=TEXT, name=NAME, arguments=TEXT),
                    one_of("function_call_output", call_id={"type": "string", "minLength": 1}, output=PARTS),
                ]
            },
        },
    ]
}
RESPONSES: Mapping[str, Schema] = {
    "model": {"type": "string", "minLength": 1},
    "input": INPUT,
    "instructions": {"type": ["string", "null"]},
    "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
    "text": {"type": ["object", "null"], "properties": {"format": {"type": "object"}}},
    "tools": {
        "type": ["array", "null"],
        "maxItems": tool_choice.MAX_TOOLS,
        "items": {**FUNCTION, "required": ["type", "name"],
                  "properties": {"type": {"const": "function"}, **FUNCTION["properties"]}},
    },
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, one_of("function", name=NAME)]},
    "include": {
        "type": ["array", "null"],
        "items": {"enum": ["message.output_text.logprobs", "reasoning.encrypted_content"]},
    },
}  # fmt: skip
"""What differs from a chat. `text.format` is as in `response_format`, without the level `json_schema`."""
OF_CHAT = (
    "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "user", "ignore_eos", "min_tokens", "parallel_tool_calls", "top_logprobs",
)  # fmt: skip
"""Parameters that /v1/responses has with the same meaning."""

USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
}
MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "root"],
    "properties": {
        "id": TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": TEXT,
        "root": {"type": "string", "description": "The full name, which never changes its meaning."},
        "parent": {"type": "string", "description": "The full name of the base, of an adapter."},
        "max_model_len": {"type": "integer", "description": "Tokens of prompt and completion together."},
    },
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
RESPONSE: Schema = {
    "type": "object",
    "required": ["id", "object", "created_at", "model", "status", "output", "store", "usage"],
    "properties": {
        "id": TEXT,
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "model": TEXT,
        "status": {"enum": ["completed", "incomplete"]},
        "output": {"type": "array", "items": {"type": "object", "required": ["id", "type", "status"]}},
        "store": {"const": False},
        "usage": {
            "type": "object",
            "required": ["input_tokens", "output_tokens", "total_tokens"],
            "properties": {
                name: {"type": "integer", "minimum": 0} for name in ("input_tokens", "output_tokens", "total_tokens")
            },
        },
    },
}
TOKENS: Schema = {
    "type": "object",
    "required": ["count", "max_model_len", "tokens", "token_strs"],
    "properties": {
        "count": {"type": "integer", "minimum": 1},
        "max_model_len": {"type": "integer"},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "token_strs": {"type": ["array", "null"], "items": TEXT},
    },
}
PROMPT: Schema = {"type": "string", "minLength": 1}
DETOKENIZE: Schema = {
    "type": "object",
    "required": ["model", "tokens"],
    "additionalProperties": {"enum": list(json_body._NOTHING)},
    "properties": {
        "model": {"type": "string", "minLength": 1},
        "tokens": {**TOKEN_IDS, "minItems": 0, "maxItems": tokenization.MAX_TOKENS},
    },
}
DETOKENIZED: Schema = {"type": "object", "required": ["prompt"], "properties": {"prompt": TEXT}}
ANSWERED = "Answered"
KEY: list[Schema] = [{"apiKey": []}]


def completion(kind: str, **part: Schema) -> Schema:
    choice = {"index": {"type": "integer"}, "finish_reason": {"type": ["string", "null"]}, **part}
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": TEXT,
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": TEXT,
            "choices": {"type": "array", "items": {"type": "object", "required": list(choice), "properties": choice}},
            "usage": USAGE,
        },
    }


def document() -> str:
    """The document as JSON text."""
    chat, plain = parsed_bodies()
    answer: Schema = {"type": "object", "required": ["role", "content"]}
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "Lorapool gateway",
            "version": "1",
            "description": "OpenAI's API for bases and LoRA adapters. A parameter that is not listed is refused, "
            "unless its value asks for nothing.",
        },
        "security": KEY,
        "paths": {
            protocol.ROUTE_CHAT: {
                "post": _infers("chat", _request(chat), completion("chat.completion", message=answer))
            },
            protocol.ROUTE_COMPLETIONS: {
                "post": _infers("complete", _request(plain), completion("text_completion", text=TEXT))
            },
            protocol.ROUTE_RESPONSES: {"post": _infers("respond", _responses(chat), RESPONSE)},
            protocol.ROUTE_TOKENIZE: {
                "post": _converts("tokenize", {"anyOf": [_tokenized(chat), _tokenized(plain, prompt=PROMPT)]}, TOKENS)
            },
            protocol.ROUTE_DETOKENIZE: {"post": _converts("detokenize", DETOKENIZE, DETOKENIZED)},
            protocol.ROUTE_MODELS: {
                "get": _reads("listModels", "The models that the key may use.", _list_of(_ref("Model")), [])
            },
            protocol.ROUTE_MODELS + "/{model}": {
                "get": _reads("getModel", "One model, by any of its names.", _ref("Model"), [_MODEL_NAME]),
                "delete": tuning_paths.deletes_model(_errors(), _MODEL_NAME),
            },
            **tuning_paths.paths(_errors()),
        },
        "components": {
            "schemas": {"Model": MODEL, "Error": ERROR, "Messages": MESSAGES, **tuning_paths.schemas()},
            "responses": {f"Error{status}": answer for status, answer in _described_errors().items()},
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json.dumps(made, indent=1) + "\n"


_MODEL_NAME = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
    "description": "A full name has a slash, which need not be encoded.",
}


def _converts(name: str, body: Schema, answer: Schema) -> Schema:
    found = _infers(name, body, answer)
    del found["responses"]["200"]["content"]["text/event-stream"]
    return found


def _tokenized(body: RecordingBody, **own: Schema) -> Schema:
    known = _request(body)
    flag: Schema = {"type": ["boolean", "null"]}
    more: Schema = {"return_token_strs": flag, "add_special_tokens": flag if own else {"enum": [None, False]}}
    return {**known, "properties": {**known["properties"], **more, **own}}


def _infers(name: str, body: Schema, answer: Schema) -> Schema:
    content = {"application/json": {"schema": answer}, "text/event-stream": {"schema": EVENTS}}
    return {
        "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": ANSWERED, "content": content}, **_errors()},
    }


def _reads(name: str, summary: str, answer: Schema, parameters: list[Schema]) -> Schema:
    known = {status: error for status, error in _errors().items() if status in ("401", "404", "503")}
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "responses": {"200": {"description": ANSWERED, "content": {"application/json": {"schema": answer}}}, **known},
    }


def _request(body: RecordingBody) -> Schema:
    own = {name: _parameter(name, body) for name in texts.PARAMETERS if name in body.known}
    labels: dict[str, Schema] = {name: {} for name in sorted(json_body._LABELS)}
    neutral = {name: {"enum": list(values)} for name, values in json_body._NEUTRAL.items() if name not in own}
    return {
        "type": "object",
        "required": [name for name in own if name in REQUIRED],
        "additionalProperties": {"enum": list(json_body._NOTHING)},
        "properties": {**own, **labels, **neutral},
    }


def _responses(chat: RecordingBody) -> Schema:
    shared = {name: _parameter(name, chat) for name in OF_CHAT}
    return {
        "type": "object",
        "required": ["model", "input"],
        "properties": {**RESPONSES, **shared, "store": {"type": ["boolean", "null"]}},
    }


def _parameter(name: str, body: RecordingBody) -> Schema:
    schema = body.schemas.get(name) or NESTED[name]
    if name not in REQUIRED and schema:  # null counts as absent
        schema = {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "description": texts.PARAMETERS[name]}


def _errors() -> dict[str, Schema]:
    """References to the errors by their status."""
    return {status: {"$ref": f"#/components/responses/Error{status}"} for status in _described_errors()}


def _described_errors() -> dict[str, Schema]:
    """The errors by their status."""
    whats: dict[int, list[str]] = {}
    for kind in vars(openai).values():
        if isinstance(kind, type) and issubclass(kind, openai.ApiError) and kind is not openai.ApiError:
            whats.setdefault(kind.status, []).append((kind.__doc__ or "").splitlines()[0])
    content = {"application/json": {"schema": _ref("Error")}}
    return {str(status): {"description": " ".join(what), "content": content} for status, what in sorted(whats.items())}


def _list_of(item: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": item}},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
