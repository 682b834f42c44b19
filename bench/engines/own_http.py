"""Lorapool's runtime over HTTP, as an engine of W1: `python -m engines.own_http BASE VOLUMES DTYPE`.

It has the same engine settings as `own_engine`, behind the shipped server. Answers are compared as text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common.places import W1_CLAIM
from common.workloads import REQUESTS, Batch, adapter_name
from engines.over_http import Clients
from engines.process import serve
from engines.standalone import Standalone

from lorapool_api.common import HEADER_ADAPTER


class OwnHttp:
    def __init__(self, runtime: Standalone) -> None:
        self.versions: dict[str, str] = {}
        names = [adapter_name(number) for number in range(REQUESTS)]
        self._headers: dict[str | None, str] = {None: "base"}
        self._headers.update(runtime.register(W1_CLAIM, names, idleAfterS=3600))
        self._clients = Clients(runtime.port, REQUESTS)

    def prepare(self, batch: Batch) -> None:
        """Loads every adapter of the batch into a slot by generating one token with it."""
        names = sorted({name for name in batch.adapters if name is not None})
        self._post(Batch(((5,),) * len(names), tuple(names), 1))

    def generate(self, batch: Batch) -> list[list[int]]:
        """The bytes of each answer's text: token ids are not part of the HTTP response."""
        return [list(text.encode()) for text in self._post(batch)]

    def _post(self, batch: Batch) -> list[str]:
        bodies = [
            {"model": "base", "prompt": [*prompt], "max_tokens": batch.new, "temperature": 0, "ignore_eos": True}
            for prompt in batch.prompts
        ]
        headers = [{HEADER_ADAPTER: self._headers[name]} for name in batch.adapters]
        answers = self._clients.post_all("/v1/completions", bodies, headers)
        for answer in answers:
            if answer["usage"]["completion_tokens"] != batch.new:
                raise RuntimeError(f"{answer['usage']} instead of {batch.new} tokens")
        return [answer["choices"][0]["text"] for answer in answers]


if __name__ == "__main__":
    base, volumes, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    engine = {
        "dtype": dtype, "max_rank": 64, "slots": REQUESTS, "max_batch": REQUESTS, "max_model_len": 512,
        "prefix_cache": False,  # as in own_engine
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as cache,
        Standalone(base, volumes, Path(cache), engine, "own-http-server") as server,
    ):
        server.wait_until_ready()
        serve(lambda: OwnHttp(server))
