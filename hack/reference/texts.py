"""What the code does not say about itself: the introductions, and a text for each route, parameter and error code.

The generator fails where a text is missing, and where one is left over.
"""

from __future__ import annotations

from lorapool_api import common, pod_address, protocol, usage_protocol
from lorapool_api.trust import poll_proof
from lorapool_runtime.openai import encoding, messages, request, tokenization
from lorapool_runtime.openai.chats import template_options
from lorapool_runtime.openai.tools import tool_choice

PATTERNS = {
    common.DURATION_PATTERN: "a duration such as `90s`, `5m` or `1h30m`",
    common.QUANTITY_PATTERN: "a quantity such as `512Mi` or `2Gi`",
    common.DIGEST_PATTERN: "`sha256:` and 64 hex digits",
    common.DECIMAL_PATTERN: "a number of 0 or more as text, such as `0.1` or `1e-3`",
}

OBJECTS = """# Objects

The custom resources of the group `lorapool.dev`. `kubectl explain lora.spec` shows the same.
"""

REFUSALS = """# Why an adapter is refused, and what to do

Each refusal is one of these sentences and its remedy; what is in italics differs. `lorapool inspect` reports all that
apply at once, the status of a LoraAdapter the first. Names that trainers leave in tensors (`_orig_mod.`, `module.`,
`_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `.default.` before `weight`, no `base_model.model.`) are
understood and no reason to refuse.
"""

CONDITIONS = """# Conditions and reasons

`kubectl describe` shows them. The column `STATE` of `kubectl get` is the reason that says most.
"""

FAILURES = f"""
## Reasons of failures

The message of the condition has the details. A transient failure is tried again at `status.failure.retryAt`. A terminal
one is checked again when the spec changes or the annotation `{common.ANNOTATION_RETRY}` gets a new value.
`SourceNotFound` and `Unauthorized` are both: terminal for requests, and the source is read again at `retryAt`, after 10
minutes at most; after a change of the operator's mounted credentials `Unauthorized` is tried again at once. A
request is answered with 503 for a transient and 422 for a terminal failure, and with the error code.

"""

JOB_FAILURES = """
## Failures of a FineTuneJob

A job with a terminal failure has ended and never changes again: correct the cause and create another job. One with a
transient failure goes on by itself.

"""

METRICS = """# Metrics

All three processes also export the Python client's `process_` and `python_` metrics.
"""

PROFILES = """# Runtime profiles

The fields of a profile in the chart's value `runtimeProfiles`. BaseModels name a profile in `spec.runtimeProfile`; only
the administrator of the release writes profiles. A change of a profile rolls the pods of the bases that use it.

"""

SETTINGS = """# Settings

Each process reads its settings from the environment at start; the chart sets them from its values. A variable that
begins with `LORAPOOL_` and is not a setting of the process stops it. Each setting of the runtime is also a flag:
`LORAPOOL_RUNTIME_MAX_RANK=64` is `--max-rank 64`, and the flag wins.
"""

RUNTIME_PROTOCOL = f"""# Runtime protocol

What gateway and operator send to a runtime. Every route needs the bearer token of its base unless it says otherwise.
The port is {protocol.RUNTIME_PORT}. Its name in the pod is the scheme: `https` where the runtime serves TLS, with a
certificate for `<uid of the base>.{pod_address.DOMAIN}`, else `http`.

"""

HEADERS = {
    common.HEADER_ADAPTER: "Request: `<uid>@<digest>` or `base`, the weights that must answer, whatever the body's "
    "`model` is. Answer: what answered.",
    common.HEADER_USAGE: "Request, value 1: SSE comments with the `Usage` so far. JSON answer: the usage.",
    "accept": "Request, `text/event-stream`, together with the usage: the head of the answer is sent as soon as the "
    "request is admitted, and the body of a whole answer, or an error that occurs later, is one data event.",
    common.HEADER_ATTEMPT: "Request: an id that no other request has, for `DELETE /v1/attempts/{id}`.",
    usage_protocol.HEADER_KEY: "Request: uid of the Secret of the API key, for the usage records. Set by the gateway.",
    usage_protocol.HEADER_PROJECT: "Request: the namespace that pays, for the usage records. Set by the gateway.",
    protocol.HEADER_TENANT: "Request: an opaque identifier of the caller's tenant, a hash. Tenants share a replica "
    "fairly, and no computed beginnings of prompts.",
    common.HEADER_COLD_START: "Answer: milliseconds the request waited for a load; absent when it did not.",
    common.HEADER_REQUEST_ID: "Request and answer: the id in all logs.",
    common.HEADER_RELAXED: "Answer: the keywords of the request's JSON schemas that are not enforced; absent when all "
    "are.",
    poll_proof.HEADER_PROOF: "Answer to a poll whose `Authorization` is a `LorapoolPoll` challenge in place of the "
    "token: proves the pod and the body (`lorapool_api.trust.poll_proof`).",
    common.HEADER_PROCESSING_MS: "Answer: milliseconds until the headers were sent.",
}

GATEWAY_API = f"""# Gateway API

OpenAI's API with an API key as bearer token: `POST {protocol.ROUTE_CHAT}`, `POST {protocol.ROUTE_COMPLETIONS}`,
`POST {protocol.ROUTE_RESPONSES}`, `GET {protocol.ROUTE_MODELS}` and `GET {protocol.ROUTE_MODELS}/{{id}}`; and vLLM's
`POST {protocol.ROUTE_TOKENIZE}` and `POST {protocol.ROUTE_DETOKENIZE}`.
`GET {protocol.ROUTE_OPENAPI}` returns the OpenAPI document, and `GET {protocol.ROUTE_VERSION}` the version.
{" and ".join(f"`GET {route}`" for route in protocol.ALIVE_ROUTES)} need no key: 200, or 503 once the pod is
about to end. [clients.md](clients.md) says which clients work.

A parameter that asks for something is supported or refused by name, never ignored silently. One that is not listed
here is accepted with a value that asks for nothing: `null`, `false`, `""`, `[]` or `{{}}`. Whole numbers may be
written as `8.0`.

## Supported parameters

"""

RESPONSES = f"""
## `{protocol.ROUTE_RESPONSES}`

`input` and `instructions` become the messages of a chat, and the parameters of a chat have the same names, bounds and
effects, except:

- `max_output_tokens`, `top_logprobs`, `tools` and `tool_choice` have OpenAI's form for this API; tools are functions.
- `text.format` is the response format, `text.verbosity` and `reasoning.effort` are the chat's `verbosity` and
  `reasoning_effort`.
- Items of `input` are messages, `function_call`, `function_call_output` and `reasoning`. Earlier reasoning is not
  shown to the model again; that of the answer is an item with a `reasoning_text`.
- `include` knows `message.output_text.logprobs` and, without effect, `reasoning.encrypted_content`.
- `n`, `logprobs`, `messages`, `response_format`, `max_tokens` and `max_completion_tokens` do not exist.

**Nothing is stored.** `store` is accepted without effect, and the answer says `"store": false`.
`previous_response_id`, `conversation`, `background`, `prompt` and items of the type `item_reference` are refused:
send the whole conversation in `input`. Some clients send references unless they are given `store: false`. `GET
{protocol.ROUTE_RESPONSES}/{{id}}` is a 404.

A stream has OpenAI's events from `response.created` to `response.completed` or, for an answer that
`max_output_tokens` cuts off, `response.incomplete`. An error in the middle of it is one event with an `error`."""

TOKENS = f"""
## `{protocol.ROUTE_TOKENIZE}` and `{protocol.ROUTE_DETOKENIZE}`

The tokens are those that a request to the same `model` has, with the chat template and the tokens of the adapter. A
base that is scaled to zero is started, and an adapter that is not loaded is loaded. Nothing is generated or counted.

`{protocol.ROUTE_TOKENIZE}` takes the body of a chat, or of a completion with one `prompt` that is a string, and:

- `add_special_tokens`: whether a prompt begins with the start token, if the base has one; by default it does. The
  control tokens of a chat are those of its template.
- `return_token_strs`: the answer has the tokens as the vocabulary writes them in `token_strs`, else null.

The answer is `count`, `tokens` and `max_model_len`, the tokens of prompt and completion together that the model has
room for. `count` may be larger.

`{protocol.ROUTE_DETOKENIZE}` takes `model` and at most {tokenization.MAX_TOKENS} `tokens`. The answer is their text in
`prompt`, with that of control tokens."""

SCHEMAS = f"""
## JSON schemas

A grammar makes every answer follow the schema of its `response_format`, or of the tool that it calls. With both, an
answer is calls or follows the format.

- An object that lists `properties` has no others, unless it has `additionalProperties`. A tool that lists none is
  called with `{{}}`.
- A keyword that no grammar can enforce (`not`, `propertyNames`, `uniqueItems`, `if`, an unknown `format`, a `pattern`
  with look-ahead) is left out, and the header `{common.HEADER_RELAXED}` lists where. With `strict: true` the request
  is refused instead, and the error names the keywords.
- Unknown keywords are annotations. `null` as the value of a keyword means that it is not given.
- The arguments of a call are streamed as they are generated. `max_tokens` may cut them off: `finish_reason` is then
  `length`."""

ANSWER_HEADERS = {
    common.HEADER_REQUEST_ID: "The id in all logs: the request's own, or a new one.",
    common.HEADER_ADAPTER: "What answered: `<namespace>/<name>@<digest>`, or `base`. The gateway's own errors lack it.",
    common.HEADER_PROCESSING_MS: "Milliseconds until the head of the answer was sent.",
    common.HEADER_COLD_START: "Milliseconds that the request was held or waited for its adapter's load; absent when it "
    "did not.",
    common.HEADER_RELAXED: "The keywords of the request's JSON schemas that are not enforced, by parameter and path; "
    "absent when all are.",
}

REFUSED = """
## Refused

Only a value that asks for nothing is accepted; `null` counts as absent.

"""

ERRORS = """
## Errors

The body is `{"error": {"message", "type", "param", "code"}}`. A failed adapter is answered with the error code of its
failure, see [conditions.md](conditions.md).

"""

RUNTIME_ROUTES: dict[tuple[str, str], str] = {
    ("GET", protocol.ROUTE_HEALTH): "200 while the engine lives. No token.",
    ("GET", protocol.ROUTE_READY): "200 once the base is loaded and until the process drains, else 503. No token.",
    ("GET", protocol.ROUTE_METRICS): "Prometheus text: the metrics of [metrics.md](metrics.md), and the `vllm:` names.",
    ("GET", protocol.ROUTE_RUNTIME): (
        "Long poll of the state: answers `RuntimeSnapshot` at once when its `seq` is above the query's `after`, else "
        f"after a change or `wait` seconds (at most {protocol.LONG_POLL_MAX_S:g}). With `boot`, the boot id of the "
        "reader's last snapshot, the answer has only what changed since `after`."
    ),
    ("GET", protocol.ROUTE_BASE_MODULES): "What adapters may name in the base, with all names of each module: "
    "`BaseModules`. 503 until the base is loaded.",
    ("GET", protocol.ROUTE_EVENTS): "Long poll of loads and unloads, with `after` and `wait`: `EventsAnswer`.",
    ("GET", usage_protocol.ROUTE_USAGE): "Long poll of the usage records of one process of the pod that are numbered "
    f"above `after`, at most {usage_protocol.PAGE_RECORDS}: `UsagePage`. `boot` is the process; without it, the oldest "
    f"of which records are kept. With `wait` (at most {protocol.LONG_POLL_MAX_S:g} seconds) it waits for one.",
    (
        "DELETE",
        usage_protocol.ROUTE_USAGE,
    ): "Acknowledges the records of the process `boot` up to the number `through`: they are forgotten. Answers 204.",
    (
        "PUT",
        protocol.ROUTE_ADAPTER,
    ): "Registers `AdapterDescriptor` under uid and digest; idempotent. Answers `PutAnswer`.",
    (
        "DELETE",
        protocol.ROUTE_ADAPTER,
    ): "Lets running requests of the adapter end, then removes it. Answers `DeleteAnswer`.",
    ("PUT", protocol.ROUTE_CREDENTIALS): (
        "Takes the namespaces' own credentials for sources, `NamespaceCredentials`, in place of those before. They "
        "stay in memory. Answers 204."
    ),
    ("POST", protocol.ROUTE_RESOLVE): "Checks a source without loading it: `ResolveRequest` to `ResolveAnswer`.",
    (
        "DELETE",
        protocol.ROUTE_ATTEMPT,
    ): "Ends the request that was sent with this `x-lorapool-attempt`, if it has not ended. Answers its final `Usage`.",
    ("GET", protocol.ROUTE_MODELS): "The base and the registered adapters, as OpenAI lists models.",
    ("GET", protocol.ROUTE_MODELS + "/{model}"): "One of them.",
    ("POST", protocol.ROUTE_CHAT): "OpenAI's chat completions, see [gateway-api.md](gateway-api.md).",
    ("POST", protocol.ROUTE_COMPLETIONS): "OpenAI's completions, see [gateway-api.md](gateway-api.md).",
    ("POST", protocol.ROUTE_RESPONSES): "OpenAI's responses, see [gateway-api.md](gateway-api.md).",
    ("POST", protocol.ROUTE_TOKENIZE): "The tokens of a prompt, see [gateway-api.md](gateway-api.md).",
    ("POST", protocol.ROUTE_DETOKENIZE): "The text of tokens, see [gateway-api.md](gateway-api.md).",
}

PARAMETERS: dict[str, str] = {
    "model": "A name as `GET /v1/models` lists it; an adapter also by its short name where that is unambiguous.",
    "messages": f"1 to {messages.MAX_MESSAGES} messages of the roles {', '.join(messages.ROLES)}; content is text "
    "or a list of text parts. `developer` is read as `system`, `function` as `tool`. Fields that other servers and "
    "clients add to earlier messages are accepted; `reasoning_content` and `reasoning` are passed to the template.",
    "prompt": f"A string, a list of token ids, or a list of at most {request.MAX_SEQUENCES} of these. Prompts times "
    f"`n` are at most {request.MAX_SEQUENCES}.",
    "stream": "Server-sent events, one chunk for each piece of text.",
    "stream_options": "`include_usage` and `continuous_usage_stats` (the usage so far in every chunk), only with "
    "`stream`.",
    "max_tokens": "At most so many; where the context has less room after the prompt, that room. With `n` choices they "
    f"share a budget of {encoding.MAX_REQUEST_TOKENS} tokens or one context, whichever is larger. "
    f"Default: all that fits for chat, {request.DEFAULT_COMPLETION_TOKENS} for completions. 0 is allowed with `echo`.",
    "min_tokens": "No end token before so many. Stop strings still end an answer. Cannot be combined with a grammar. "
    "Not OpenAI's.",
    "max_completion_tokens": "The same; it wins over `max_tokens`.",
    "n": "Choices for each prompt. They share the computed prompt.",
    "temperature": "0 takes the most likely token.",
    "top_p": "Nucleus sampling.",
    "top_k": "0 and -1: off. Not OpenAI's.",
    "min_p": "Least probability relative to the most likely token. Not OpenAI's.",
    "seed": "Makes sampling repeatable for the same request on the same weights.",
    "stop": f"A string or at most {request.MAX_STOPS} strings of 1 to {request.MAX_STOP_CHARS} characters; a control "
    "token by its text too.",
    "stop_token_ids": f"At most {request.MAX_STOP_TOKEN_IDS} ids of tokens that end an answer, also with `ignore_eos`. "
    "Not OpenAI's.",
    "skip_special_tokens": "False: control tokens are part of the text. Default: true. Not OpenAI's.",
    "include_stop_str_in_output": "The stop string, or the token that ended the answer, is part of the text. Not "
    "OpenAI's.",
    "chat_template_kwargs": f"At most {template_options.MAX_KWARGS} variables for the chat template, such as "
    "`enable_thinking`; those that the server sets itself are refused. Not OpenAI's.",
    "reasoning_effort": f"One of {', '.join(template_options.REASONING_EFFORTS)}: passed to the chat template, with "
    "`enable_thinking` false for `none` and true for the others. Without effect on a template that reads neither.",
    "add_generation_prompt": "Whether the prompt ends with the beginning of the assistant's turn. Default: true, but "
    "false with `continue_final_message`. Not OpenAI's.",
    "continue_final_message": "The answer continues the last message, which is the assistant's. Not OpenAI's.",
    "logprobs": f"Chat: true or false. Completions: the number of most likely tokens, 0 to {request.MAX_TOP_LOGPROBS}.",
    "top_logprobs": "Needs `logprobs`.",
    "presence_penalty": "Subtracted once for a token that occurred.",
    "frequency_penalty": "Subtracted for each occurrence of a token.",
    "repetition_penalty": "Divides the logits of tokens that occurred. Not OpenAI's.",
    "logit_bias": f"At most {request.MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100.",
    "user": "Accepted without effect.",
    "ignore_eos": "Generates up to `max_tokens`. Cannot be combined with a grammar. Not OpenAI's.",
    "response_format": "`text`, `json_object`, or `json_schema` with `name` and `schema`: see [JSON schemas]"
    "(#json-schemas).",
    "tools": f"At most {tool_choice.MAX_TOOLS} functions; a grammar enforces their `parameters`: see [JSON schemas]"
    f"(#json-schemas). An answer has at most {tool_choice.MAX_CALLS} calls.",
    "tool_choice": "`none`, `auto`, `required`, or one function by name.",
    "parallel_tool_calls": "Whether an answer may hold more than one call. Default: true.",
    "echo": "Returns the prompt before the completion, with `logprobs` also its log-probabilities.",
}

ERROR_CODES: dict[str, str] = {
    "": "The parameter in `param` is missing or out of bounds; the message says which values are accepted.",
    "adapter_failed": "The adapter cannot be served, for a reason of a newer version; see the message.",
    "adapter_not_ready": "The adapter's source is still being checked. Try again after `Retry-After`.",
    "adapter_not_registered": "Runtime only: register the adapter with `PUT` and repeat. The gateway does so itself.",
    "adapter_suspended": "The adapter's spec.suspend is true.",
    "bad_upstream": "A runtime sent an answer that the gateway does not understand. Compare their versions.",
    "bad_http": "The request is not valid HTTP/1.1, or its headers are too long.",
    "base_not_found": "The adapter's BaseModel does not exist.",
    "base_unavailable": "No pod of the BaseModel can start: the message quotes the condition that says why.",
    "base_start_failed": "The base failed to start and may not be started again yet; its conditions say why. Try again "
    "after `Retry-After`.",
    "bodies_exceeded": "The gateway holds as many bytes of bodies as `gateway.maxHeldBodyBytes` allows. Try again.",
    "body_timeout": "The client sent its body too slowly.",
    "chat_template_refused": "The model's chat template does not accept these messages; the message says why.",
    "chat_template_timeout": "The model's chat template did not end in time. It is not tried again for a minute.",
    "cold_start_timeout": "No replica became ready within spec.coldStart.maxWait. Try again after `Retry-After`.",
    "context_length_exceeded": "The prompt is longer than the context. Shorten it.",
    "deadline_exceeded": "The request took longer than `gateway.deadlineSeconds`. Ask for fewer tokens.",
    "draining": "This runtime is shutting down. The gateway tries another replica.",
    "grammar_timeout": "Compiling the schema took too long. Simplify it.",
    "internal_error": "A fault of Lorapool: its log has the `x-request-id`.",
    "invalid_api_key": "The key is missing, unknown or deleted.",
    "invalid_body": "The body is not what its headers say.",
    "invalid_json": "The body is not a JSON object, or is nested too deeply.",
    "invalid_value": "`model` or `stream` is missing or of the wrong type, or the value in `param` is out of bounds.",
    "key_bodies_exceeded": "The requests of this API key hold as many bytes of bodies as "
    "`gateway.maxHeldBodyBytesPerKey` allows. Try again.",
    "key_in_flight_exceeded": "This API key has as many requests under way as its `maxInFlight` allows.",
    "key_share_exceeded": "The gateway is nearly full; a part of its room is kept for keys with fewer requests.",
    "load_timeout": "The adapter's load did not end in time. Try again after `Retry-After`.",
    "method_not_allowed": "The route exists, the method does not; see the header `Allow`.",
    "keys_stale": "The API server has not confirmed the API keys for longer than `apiKeys.maxAgeSeconds`, and "
    "`apiKeys.whenStale` is `refuse`.",
    "keys_unknown": "The process has just started and has not read the API keys yet; repeat the request.",
    "ledger_unavailable": "The ledger, which has the API for usage and costs, does not answer. Try again after "
    "`Retry-After`.",
    "model_not_found": "There is no such model, or the key may not use it, or its short name means several models.",
    "no_chat_template": "The model has no chat template. Use `/v1/completions`, or set spec.chatTemplate.",
    "no_slot": "All slots of the base are in use or pinned. Raise spec.lora.slots or spec.scaling.maxReplicas.",
    "not_found": "There is no such route; the message says what to use instead, where it is known.",
    "payload_too_large": "The body is larger than `gateway.maxBodyBytes`, or an uploaded file than 512 MiB.",
    "prompt_timeout": "Rendering or tokenizing the prompt took too long. Shorten it.",
    "queue_full": "The runtime's queue is full. Try again after `Retry-After`.",
    "quota_unavailable": "The ledger is away, and the quotas of the request do not permit it without the ledger "
    "(`LORAPOOL_GATEWAY_QUOTA_BUDGETS_WHEN_AWAY` and `…_RATES_WHEN_AWAY`).",
    "price_missing": "A budget of money counts for the request, and its model has no price, or the prices are in "
    "another currency. The administrator adds the price or changes the budget. Clients do not repeat the request.",
    "rate_limit_exceeded": "A rate of requests or tokens per minute is reached (`type` says which; wait for "
    "`retry-after-ms`), or the gateway has as many requests under way as it accepts, or the organization as many "
    "unfinished fine-tuning jobs as it may.",
    "request_timeout": "The body did not reach the runtime in time.",
    "schema_too_large": "The schema is larger than a grammar may be. Simplify it.",
    "starting": "The runtime's base is still loading. The gateway waits or tries another replica.",
    "too_many_adapters": "The runtime knows as many adapters as `LORAPOOL_RUNTIME_MAX_ADAPTERS` allows, all in use.",
    "too_many_connections": "The client's address, or all clients, have as many connections open as a gateway allows.",
    "too_many_held_requests": "As many requests wait for this base as spec.coldStart.maxQueued allows.",
    "unknown_parameter": "There is no such parameter.",
    "unsupported_content": "Only text can be read: no images, audio or files.",
    "unsupported_encoding": "The body has a `Content-Encoding`. Send it uncompressed.",
    "unsupported_parameter": "OpenAI's parameter is not supported with this value.",
    "unsupported_role": "The role of a message is unknown.",
    "unsupported_schema": "The schema is wrong, or is `strict` and uses a keyword that cannot be enforced, which the "
    "message names.",
    "upstream_lost": "The runtime was lost before or during its answer. Try again.",
    "upstream_timeout": "The runtime sent nothing for `gateway.requestTimeoutSeconds`.",
    "wrong_adapter": "A runtime answered for other weights than were asked for; the answer was withheld.",
    "file_not_found": "There is no such file in this organization, or it has expired.",
    "fine_tune_not_found": "There is no such fine-tuning job in this organization.",
    "invalid_file": "A file of the job does not exist in this organization.",
    "invalid_job": "The job breaks a rule of the FineTuneJob object, which the message quotes.",
    "invalid_organization": "The header `OpenAI-Organization` names no namespace of the key.",
    "job_ended": "The fine-tuning job has ended, and cannot be steered any more.",
    "missing_required_parameter": "The parameter in `param` is required.",
    "insufficient_quota": "The month's tokens or money of the key, the namespace or the model are used up, or the "
    "organization trained as many tokens this month as it may. Clients do not repeat the request.",
    "organization_required": "The key has several namespaces; name one with the header `OpenAI-Organization`.",
    "permission_denied": "The key may not use files and fine-tuning: its Secret lacks `fineTuning`.",
    "storage_limit_exceeded": "The files of the organization have as many bytes as the store allows. Delete some.",
    "unavailable": "The store or the API server does not answer. Try again after `Retry-After`.",
}
