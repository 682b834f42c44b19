"""The open loop's client repeats a request that finds no slot while its time continues; other errors are final."""

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web
from common.open_loop import Load, _run
from common.workloads import Arbaseline


def load_on(statuses: Sequence[int]) -> tuple[Load, int]:
    """One request to a server that answers with these statuses in turn; how often it was asked."""
    left = list(statuses)

    async def answer(request: web.Request) -> web.StreamResponse:
        status = left.pop(0)
        if status != 200:
            return web.json_response({"error": {"message": "no"}}, status=status)
        return web.Response(body=b"data: {}\n\ndata: {}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async def run() -> Load:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await _run(runner.addresses[0][1], [Arbaseline(0.0, 0, (5, 6), 2)], ["a@d"], 30.0)
        finally:
            await runner.cleanup()

    return asyncio.run(run()), len(statuses) - len(left)


@pytest.mark.parametrize("refusals", [0, 1, 3])
def test_a_request_without_a_slot_is_sent_again_until_it_has_one(refusals: int) -> None:
    load, asked = load_on([409] * refusals + [200])
    (answer,) = load.answers
    assert asked == refusals + 1
    assert (answer.error, answer.no_slot, answer.tokens, len(answer.chunks_s)) == (None, refusals, 2, 2)
    assert answer.first_s >= 0.05 * refusals


@pytest.mark.parametrize("status", [400, 429, 503])
def test_another_error_is_counted_and_never_repeated(status: int) -> None:
    load, asked = load_on([status, 200])
    assert (load.errors, asked) == (1, 1)
    assert str(status) in (load.answers[0].error or "")
