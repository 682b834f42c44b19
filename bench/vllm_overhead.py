"""Our runtime on vLLM against vLLM's own server, both over HTTP, on the same base and adapters.

    python bench/vllm_overhead.py [--rounds 5] [--requests 16] [--new 64] [--base DIR] [--records PATH]

Both run in vLLM's environment (`make bench-baselines`, or the image runtime-vllm on a GPU), with the same settings of
the engine: the same slots, rank, batch and precision, without a prefix cache. All adapters are loaded before. Rounds
alternate between the two servers, of which the other is stopped. The figures are tokens per second of a closed batch of
distinct adapters, and of the base alone, by the clock and by the processor time of all processes. Our server is to keep
0.95 of what vLLM's own reaches.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from common.places import ROOT, VOLUMES, W1_CLAIM, base_folder, w1_adapters
from common.records import Record, against, alternate, not_run, parsed, parser, report, timed
from common.workloads import REQUESTS, Batch, adapter_name, w1
from engines.baselines import vllm_python
from engines.over_http import Clients, free_port, status_of, wait_until
from engines.standalone import ServerProcess, Standalone

from lorapool_api.common import HEADER_ADAPTER

NAMES = {"distinct16": "vllm.distinct_over_bare", "base": "vllm.base_over_bare"}
RANK, MAX_LEN = 16, 512
START_S = 900.0


def environ() -> dict[str, str]:
    """For both servers. On a CPU both get all its cores, which vLLM would not take by itself."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator", "runtime")),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "OMP_WAIT_POLICY": "PASSIVE",  # as the runtime sets it: the many small operators of adapters differ most by it
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }


class Bare(ServerProcess):
    """vLLM's own OpenAI server, with all adapters named at its start."""

    def __init__(self, python: str, base: Path, adapters: Path, dtype: str) -> None:
        self.port = free_port()
        options = {
            "model": base, "served-model-name": "base", "host": "127.0.0.1", "port": self.port, "dtype": dtype,
            "max-model-len": MAX_LEN, "max-num-seqs": REQUESTS, "max-loras": REQUESTS + 1,
            "max-cpu-loras": REQUESTS + 1, "max-lora-rank": RANK,
        }  # fmt: skip
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--no-enable-prefix-caching"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        if not Path("/dev/nvidiactl").exists():
            command.append("--enforce-eager")  # as the runtime does on a CPU
        names = [adapter_name(number) for number in range(REQUESTS)]
        command += ["--lora-modules", *(f"{name}={adapters / name}" for name in names)]
        super().__init__(command, {**os.environ, **environ()}, "vllm-bare-server")


class Server:
    """Sends batches to one of the two: an adapter is a header of ours, or the model of vLLM's.

    Between its turns all its processes are stopped: they spin while they wait, and would take the other's cores.
    """

    def __init__(self, process: ServerProcess, port: int, headers: dict[str | None, str] | None) -> None:
        self._process = process
        self._clients = Clients(port, REQUESTS)
        self._headers = headers
        self.per_cpu_s: list[float] = []
        """Tokens per second of processor time, of each run."""

    def run(self, batch: Batch) -> float:
        """Tokens per second."""
        self._process.resume()
        used_s = self._process.cpu_s()
        rate = batch.tokens / timed(lambda: self.post(batch))
        self.per_cpu_s.append(batch.tokens / (self._process.cpu_s() - used_s))
        self._process.pause()
        return rate

    def post(self, batch: Batch) -> None:
        ours = self._headers
        bodies = [
            {
                "model": "base" if ours is not None or name is None else name,
                "prompt": [*prompt], "max_tokens": batch.new, "temperature": 0, "ignore_eos": True,
            }
            for prompt, name in zip(batch.prompts, batch.adapters, strict=True)
        ]  # fmt: skip
        headers = None if ours is None else [{HEADER_ADAPTER: ours[name]} for name in batch.adapters]
        for answer in self._clients.post_all("/v1/completions", bodies, headers):
            if answer["usage"]["completion_tokens"] != batch.new:
                raise RuntimeError(f"{answer['usage']} instead of {batch.new} tokens")


def measure(python: str, base: Path, dtype: str, rounds: int, requests: int, new: int) -> list[Record]:
    adapters = w1_adapters(base)
    settings = {
        "engine": "vllm", "dtype": dtype, "max_rank": RANK, "slots": REQUESTS, "max_batch": REQUESTS,
        "max_model_len": MAX_LEN, "prefix_cache": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        own = Standalone(base, VOLUMES, Path(cache), settings, "vllm-own-server", python=python, environ=environ())
        with own, Bare(python, base, adapters, dtype) as bare:
            own.wait_until_ready(START_S)
            wait_until(lambda: status_of(bare.port, "/health") == 200, bare.process, START_S)
            names = [adapter_name(number) for number in range(REQUESTS)]
            headers: dict[str | None, str] = {None: "base", **own.register(W1_CLAIM, names, idleAfterS=3600)}
            servers = {"ours": Server(own, own.port, headers), "vLLM": Server(bare, bare.port, None)}
            for server in servers.values():  # loads every adapter
                server.run(Batch(((5,),) * REQUESTS, tuple(names), 1))
            return [record for case in NAMES for record in compared(case, servers, rounds, requests, new)]


def compared(case: str, servers: dict[str, Server], rounds: int, requests: int, new: int) -> Iterator[Record]:
    """By the clock, and by processor time, which other work on the machine changes less."""
    batch = w1(case, new).only(range(requests))
    runs = alternate({name: partial(server.run, batch) for name, server in servers.items()}, rounds)
    note = f"{requests} requests"
    yield against(NAMES[case], "tok/s", runs["ours"], "vLLM's server", runs["vLLM"], note)
    ours, theirs = (server.per_cpu_s[-rounds:] for server in servers.values())
    yield against(f"{NAMES[case]}_cpu", "tok/core-s", ours, "vLLM's server", theirs, note)


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--requests", type=int, default=REQUESTS)
    made.add_argument("--new", type=int, default=64)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--base", type=Path, help="the base's folder; default: the demo's")
    made.add_argument("--python", help="an interpreter with vLLM and the runtime's dependencies")
    given = parsed(made)
    python = given.python or vllm_python()
    if python is None:
        records = [not_run(name, "tok/s", "vLLM is not installed: make bench-baselines") for name in NAMES.values()]
    else:
        base = given.base or base_folder()
        records = measure(str(python), base, given.dtype, given.rounds, given.requests, given.new)
    report(records, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
