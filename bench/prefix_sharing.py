"""What it costs that tenants share no prefix blocks: the same requests with `sharing: Tenant` and `sharing: Base`.

    python bench/prefix_sharing.py BASE_FOLDER [--tenants 8] [--requests 4] [--shared 256] [--rounds 3] [--records PATH]

Every tenant sends `--requests` prompts one after another, which begin with the same `--shared` tokens and end with 16
of their own. The tenants send concurrently. Each run begins with other tokens, so that it finds nothing of the others.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the runtime's process sets it

import torch
from common.records import against, alternate, measured, parsed, parser, report

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams, TokenOutput
from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

OWN_TOKENS = 16
NEW = 8
SAMPLING = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
_runs = itertools.count()


def run(engine: TorchEngine, tenants: int, requests: int, shared: int, *, by_tenant: bool) -> float:
    """Seconds until the last of all requests has ended."""
    number = next(_runs)
    rng, vocabulary = random.Random(number), engine.facts.vocab_size
    beginning = tuple(rng.randrange(vocabulary) for _ in range(shared))
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()

    def send(tenant: int, turn: int) -> None:
        own = tuple(rng.randrange(vocabulary) for _ in range(OWN_TOKENS))
        scope = str(tenant) if by_tenant else ""
        name = f"{number} {tenant} {turn}"
        engine.submit(
            GenerationRequest(name, beginning + own, BASE_SLOT, "base", SAMPLING, cache_scope=scope), outputs.put
        )

    began_s = time.perf_counter()
    for tenant in range(tenants):
        send(tenant, 0)
    left = tenants * requests
    while left:
        output = outputs.get(timeout=300)
        if output.finish_reason is not None:
            left -= 1
            _, tenant, turn = map(int, output.request_id.split())
            if turn + 1 < requests:
                send(tenant, turn + 1)
    return time.perf_counter() - began_s


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("base")
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--tenants", type=int, default=8)
    asked.add_argument("--requests", type=int, default=4)
    asked.add_argument("--shared", type=int, default=256)
    asked.add_argument("--rounds", type=int, default=3)
    given = parsed(asked)
    engine = TorchEngine(EngineConfig(given.base, dtype=given.dtype, max_model_len=given.shared + 64))
    engine.start()
    sizes = given.tenants, given.requests, given.shared
    runs = alternate(
        {
            "Tenant": lambda: run(engine, *sizes, by_tenant=True),
            "Base": lambda: run(engine, *sizes, by_tenant=False),
        },
        given.rounds,
    )
    alone = [run(engine, 1, *sizes[1:], by_tenant=True) for _ in range(given.rounds)]
    engine.stop(10)
    note = f"{given.tenants} tenants, {given.requests} requests each, {given.shared} tokens in common"
    records = [
        against("prefix_sharing.tenant_over_base", "s", runs["Tenant"], "Base", runs["Base"], note),
        measured("prefix_sharing.one_tenant", "s", alone, "one tenant alone, which shares with itself"),
    ]
    report(records, given, {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
