"""`instructor` in every mode that this API can serve."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import instructor
import openai
from check import BASE, KEY, MODEL, check, raises
from instructor.core import IncompleteOutputException, InstructorRetryException
from pydantic import BaseModel, Field, field_validator


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


class Tagged(BaseModel):
    tags: set[Literal["a", "b"]] = Field(max_length=2)


class Node(BaseModel):
    value: Literal[1, 2]
    child: Node | None = None


class Never(Person):
    @field_validator("age")
    @classmethod
    def refuse(cls, age: int) -> int:
        raise ValueError("age must be right")


class Essay(BaseModel):
    essay: str = Field(min_length=500)


ASK: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Bob is 5."}], "max_retries": 0, "max_tokens": 200,
    "temperature": 0,
}  # fmt: skip


def client(mode: str) -> Any:
    made = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
    return instructor.from_openai(made, mode=getattr(instructor.Mode, mode)).chat.completions


async def async_person() -> Any:
    async with openai.AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0) as made:
        return await instructor.from_openai(made).chat.completions.create(response_model=Person, **ASK)


for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"):
    check(mode, lambda mode=mode: isinstance(client(mode).create(response_model=Person, **ASK), Person))
check("a simple type", lambda: client("TOOLS").create(response_model=Literal["spam", "ham"], **ASK) in ("spam", "ham"))
check("the completion too", lambda: client("TOOLS").create_with_completion(
    response_model=Person, **ASK)[1].usage.completion_tokens > 0)  # fmt: skip
check("async", lambda: isinstance(asyncio.run(async_person()), Person))
check("a set", lambda: isinstance(client("TOOLS").create(response_model=Tagged, **ASK), Tagged))
check("a recursive model", lambda: client("TOOLS").create(response_model=Node, **{**ASK, "max_tokens": 1000}))
check("create_partial", lambda: len(list(client("TOOLS").create_partial(response_model=Person, **ASK))) > 3)
check("a retry sends the history back", lambda: raises(InstructorRetryException, lambda: client("TOOLS").create(
    response_model=Never, **{**ASK, "max_retries": 2})))  # fmt: skip
check("an answer that is cut off says so", lambda: raises(IncompleteOutputException, lambda: client("TOOLS").create(
    response_model=Essay, **{**ASK, "max_tokens": 40})))  # fmt: skip
