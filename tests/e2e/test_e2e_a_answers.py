"""What a user of the OpenAI client gets from real fine-tunes through the real gateway."""

import json

import httpx2 as httpx
import pytest
from e2e_world import World
from openai import AuthenticationError, BadRequestError, NotFoundError, UnprocessableEntityError


def test_each_fine_tune_answers_better_than_the_base_and_says_who_it_is(world: World) -> None:
    answers = world.summary["answers"]
    assert len(answers) == 5
    for answer in answers:
        assert answer["header"].startswith(f"{world.namespace}/{answer['task']}@sha256:")
        assert answer["answer"]
        assert answer["answer"] != answer["base_answer"]
        assert answer["prompt_tokens"] > 0
        assert answer["completion_tokens"] > 0
    assert len({answer["header"] for answer in answers}) == 5


def test_a_stream_gives_the_same_text_as_one_answer_and_its_usage_at_the_end(world: World) -> None:
    with world.client() as client:
        for task in world.tasks:
            stream = client.chat.completions.create(
                **world.question(task), stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text.strip() == world.answer(task)
            assert chunks[-1].choices == []
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens > 0
            assert all(chunk.usage is None for chunk in chunks[:-1])


def test_runtimes_answer_over_tls_alone(world: World) -> None:
    task = world.tasks[0]
    assert world.chat(task) == (world.answer(task), world.header(task))
    for pod in world.runtime_pods():
        ports = [port["name"] for item in pod["spec"]["containers"] for port in item["ports"]]
        assert ports == ["https", "metrics"]
        assert "listening on https://" in world.kubectl("logs", pod["metadata"]["name"])


def test_a_stream_without_include_usage_carries_none(world: World) -> None:
    with world.client() as client:
        chunks = list(client.chat.completions.create(**world.question("routing"), stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completions_answer_with_and_without_stream(world: World, stream: bool) -> None:
    with world.client() as client:
        reply = client.completions.create(
            model=world.model("translation"), prompt="Good morning", max_tokens=8, temperature=0, stream=stream
        )
        if stream:
            parts = list(reply)
            assert "".join(part.choices[0].text for part in parts if part.choices)
        else:
            assert reply.choices[0].text
            assert reply.usage.completion_tokens <= 8


def test_the_models_are_listed_and_each_can_be_retrieved(world: World) -> None:
    with world.client() as client:
        listed = [model.id for model in client.models.list()]
        assert {world.model(task) for task in world.tasks} <= set(listed)
        assert world.model("smollm2") in listed
        assert client.models.retrieve(world.model("routing")).id == world.model("routing")


def test_a_short_name_reaches_the_adapter_when_it_is_unique(world: World) -> None:
    with world.client() as client:
        question = {**world.question("routing"), "model": "routing"}
        reply = client.chat.completions.create(**question)
    assert (reply.choices[0].message.content or "").strip() == world.answer("routing")


def test_no_key_and_a_wrong_key_get_401(world: World) -> None:
    assert httpx.get(f"{world.gateway}/v1/models", timeout=10).status_code == 401
    with world.client(api_key="lp-wrong") as client, pytest.raises(AuthenticationError) as caught:
        client.chat.completions.create(**world.question("routing"))
    assert caught.value.body["code"] == "invalid_api_key"  # type: ignore[index]


def test_an_unknown_model_is_404_and_never_the_base(world: World) -> None:
    with world.client() as client, pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(**{**world.question("routing"), "model": "lorapool/unknown"})
    assert caught.value.body["code"] == "model_not_found"  # type: ignore[index]


def test_a_key_of_another_namespace_sees_the_same_404(world: World) -> None:
    import hashlib

    key = "lp-" + "k" * 43
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "elsewhere", "labels": {"lorapool.dev/api-key": "true"}},
        "stringData": {"keySha256": hashlib.sha256(key.encode()).hexdigest(), "namespaces": "elsewhere"},
    }
    world.kubectl("apply", "-n", world.keys_namespace, "--server-side", "-f", "-", stdin=json.dumps(secret))
    with world.client(api_key=key) as client:
        world.wait("the key", lambda: _status(world, key) == 200, timeout_s=10)
        with pytest.raises(NotFoundError) as caught:
            client.chat.completions.create(**world.question("routing"))
        assert caught.value.body["code"] == "model_not_found"  # type: ignore[index]
    world.kubectl("delete", "-n", world.keys_namespace, "secret", "elsewhere")
    world.wait("the revoked key", lambda: _status(world, key) == 401, timeout_s=10)


def _status(world: World, key: str) -> int:
    return httpx.get(f"{world.gateway}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=10).status_code


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"n": 9}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_a_bad_parameter_is_400_naming_it(world: World, changed: dict[str, object], param: str) -> None:
    with world.client() as client, pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**{**world.question("routing"), **changed})
    assert param in (caught.value.body["param"] or "")  # type: ignore[index]


def test_a_body_that_is_no_json_is_400_and_one_too_large_413(world: World) -> None:
    auth = {"Authorization": f"Bearer {world.summary['api_key']}", "Content-Type": "application/json"}
    url = f"{world.gateway}/v1/chat/completions"
    assert httpx.post(url, content=b"{nope", headers=auth, timeout=10).status_code == 400
    large = httpx.post(url, content=b'{"model": "' + b"x" * (5 << 20) + b'"}', headers=auth, timeout=30)
    assert large.status_code == 413
    assert large.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_is_noticed_and_its_tokens_are_counted(world: World) -> None:
    def cancelled() -> int:
        adapter = world.get("lora", "translation")
        return int(((adapter.get("status") or {}).get("usage") or {}).get("cancelledRequests", 0))

    before = cancelled()
    with world.client() as client:
        long = {**world.question("translation"), "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(**long, stream=True)
        for number, _ in enumerate(stream):
            if number == 3:
                stream.close()
                break
    world.wait("the count of the cancelled request", lambda: cancelled() == before + 1, timeout_s=100, every_s=2)


def _code(world: World, task: str) -> str:
    try:
        world.chat(task)
    except UnprocessableEntityError as error:
        return str(error.body["code"])  # type: ignore[index]
    return "answered"


def test_a_suspended_adapter_is_refused_in_words(world: World) -> None:
    world.patch("lora", "sentiment", {"suspend": True})
    try:
        world.wait("the refusal", lambda: _code(world, "sentiment") == "adapter_suspended", timeout_s=20)
    finally:
        world.patch("lora", "sentiment", {"suspend": False})
    world.wait("Ready", lambda: world.condition("lora", "sentiment", "Ready")[0] == "True", timeout_s=30)
    assert world.chat("sentiment") == (world.answer("sentiment"), world.header("sentiment"))
