"""llama.cpp's server, as an engine of W1 over HTTP: `python -m engines.baseline_llamacpp SERVER GGUF_FOLDER`.

float32 weights, all adapters loaded, one chosen per request. The server computes requests of different adapters one
group after the other, as its manual documents; that is what is measured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.places import LOGS
from common.workloads import NEW_TOKENS, PROMPT_TOKENS, REQUESTS, Batch, adapter_name
from engines.over_http import Clients, free_port, status_of, wait_until
from engines.process import serve

from lorapool_runtime.cgroup import usable_cores


class LlamaCpp:
    def __init__(self, port: int, version: str) -> None:
        self.versions = {"llama.cpp": version}
        self._clients = Clients(port, REQUESTS)
        self._ids: dict[str, int] = {adapter_name(number): number for number in range(REQUESTS)}

    def prepare(self, batch: Batch) -> None:
        pass

    def generate(self, batch: Batch) -> list[list[int]]:
        bodies = [
            {
                "prompt": list(prompt),
                "n_predict": batch.new,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
                "lora": [] if name is None else [{"id": self._ids[name], "scale": 1.0}],
            }
            for prompt, name in zip(batch.prompts, batch.adapters, strict=True)
        ]
        answers = self._clients.post_all("/completion", bodies)
        return [[int(token) for token in answer["tokens"]] for answer in answers]


def main(server: str, folder: Path) -> None:
    port, cores = free_port(), usable_cores()
    adapters = ",".join(str(folder / f"{adapter_name(number)}.gguf") for number in range(REQUESTS))
    context = REQUESTS * 2 * (PROMPT_TOKENS + NEW_TOKENS)
    flags = {"-m": str(folder / "base-f32.gguf"), "--lora": adapters, "-np": REQUESTS, "-c": context, "-t": cores}
    command = [
        server,
        "--lora-init-without-apply",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-ctk",
        "f32",
        "-ctv",
        "f32",
    ]
    for flag, value in flags.items():
        command += [flag, str(value)]
    with (LOGS / "llamacpp-server.log").open("wb") as log:
        process = subprocess.Popen([*command, "--no-webui", "-cram", "0"], stdout=log, stderr=log)
    try:
        wait_until(lambda: status_of(port, "/health") == 200, process)
        said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
        serve(lambda: LlamaCpp(port, (said.stderr + said.stdout).splitlines()[0].removeprefix("version: ")))
    finally:
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
