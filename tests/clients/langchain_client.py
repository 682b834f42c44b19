"""`langchain-openai`: chat, streams, tools, structured output, the responses API, completions."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from typing import Annotated, Any, Literal

import openai
from check import BASE, KEY, MODEL, check, raises
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import Base64Str, BaseModel, EmailStr, Field, FilePath, HttpUrl, IPvAnyAddress, SecretStr


def chat(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_retries=0, **{"max_tokens": 40, **more}
    )


@tool
def weather(city: Annotated[str, Field(max_length=10, description="the city")]) -> str:
    "The weather of a city."
    return f"clear in {city}"


class Person(BaseModel):
    "A person."

    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


class Colour(enum.StrEnum):
    red = "red"
    blue = "blue"


FIELDS: dict[str, Any] = {
    "any": Any, "base64": Base64Str, "bytes": bytes, "date": datetime.date, "datetime": datetime.datetime,
    "decimal": decimal.Decimal, "dict": dict[str, int], "email": EmailStr, "enum": Colour, "ip": IPvAnyAddress,
    "optional": int | None, "path": FilePath, "secret": SecretStr, "set": set[Literal["a", "b"]],
    "time": datetime.time, "timedelta": datetime.timedelta, "tuple": tuple[int, bool], "union": int | bool,
    "url": HttpUrl, "uuid": uuid.UUID,
}  # fmt: skip


def tool_loop() -> bool:
    history: list[Any] = [HumanMessage("Weather in Paris?")]
    asked = chat(max_tokens=200).bind_tools([weather], tool_choice="weather").invoke(history)
    history += [asked, *(weather.invoke(call) for call in asked.tool_calls)]
    chat().bind_tools([weather], tool_choice="none").invoke(history)
    return bool(asked.tool_calls)


def streamed_usage() -> bool:
    chunks = list(chat(stream_usage=True).stream("Say hello."))
    return any(chunk.usage_metadata for chunk in chunks)


def streamed_call() -> bool:
    bound = chat(max_tokens=200).bind_tools([weather], tool_choice="weather")
    return sum(bool(chunk.tool_call_chunks) for chunk in bound.stream("Paris?")) > 3


def tool_with(kind: Any) -> object:
    class Made(BaseModel):
        "Takes one field."

        a: kind

    return chat(max_tokens=4).bind_tools([Made]).invoke("Fill it.")


check("invoke", lambda: chat().invoke("Say hello.").usage_metadata)
check("stream with usage", streamed_usage)
check("logprobs", lambda: chat(logprobs=True, top_logprobs=2).invoke("Hi").response_metadata["logprobs"]["content"])
check("n=2", lambda: len(chat(n=2).generate([[HumanMessage("Hi")]]).generations[0]) == 2)
check("tool loop", tool_loop)
check("streamed tool call", streamed_call)
check(
    "strict tool",
    lambda: chat(max_tokens=200).bind_tools([Person], strict=True, tool_choice="Person").invoke("x").tool_calls,
)
for method in ("json_schema", "function_calling"):
    structured = chat(max_tokens=200).with_structured_output(Person, method=method)
    check(
        f"structured output by {method}",
        lambda structured=structured: isinstance(structured.invoke("Bob is 5."), Person),
    )
for label, kind in FIELDS.items():
    check(f"tool with a field of type {label}", lambda kind=kind: tool_with(kind))
check(
    "user, metadata, seed, stop",
    lambda: chat(seed=1, stop=["xx"], metadata={"a": "b"}, model_kwargs={"user": "u"}).invoke("Hi"),
)
check("responses API", lambda: chat(use_responses_api=True).invoke("Hi").usage_metadata)
check("responses API, stream", lambda: len(list(chat(use_responses_api=True).stream("Hi"))) > 2)
check(
    "completions",
    lambda: OpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_tokens=8).generate(["a", "b"]).generations,
)
check("completions, stream", lambda: list(OpenAI(model=MODEL, base_url=BASE, api_key=KEY, max_tokens=8).stream("Once")))
BLOCKS = [{"type": "text", "text": "Hi"}]
CALLED = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "c"}])
check("content blocks", lambda: chat().invoke([SystemMessage("s"), HumanMessage(BLOCKS)]))
check(
    "tool result as a list", lambda: chat().invoke([HumanMessage("x"), CALLED, ToolMessage(BLOCKS, tool_call_id="c")])
)
check("max_tokens above the context", lambda: chat(max_tokens=100_000, stop=["e", "a", " "]).invoke("Hi"))
EMBEDDINGS = OpenAIEmbeddings(model=MODEL, base_url=BASE, api_key=KEY, max_retries=0, check_embedding_ctx_length=False)
check("embeddings are a 404", lambda: raises(openai.NotFoundError, lambda: EMBEDDINGS.embed_query("x")))
