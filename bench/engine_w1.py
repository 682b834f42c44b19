"""W1 in process: 16 requests, 32 prompt and 64 (`--new`) new tokens each, on the base and over 16 distinct adapters.

    python bench/engine_w1.py BASE_FOLDER [--dtype float32|bfloat16] [--rounds 3] [--peft 4]

Rivals in the same run: peft's set_adapter one request at a time (on `--peft` of the 16, scaled), and the base alone.
Rounds alternate; the table shows median and spread. In float32 the tokens must equal peft's, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorapool_runtime.cores import usable_cores
from lorapool_runtime.engine import EngineConfig, TorchEngine
from lorapool_runtime.interface import BASE_SLOT, GenerationRequest, SamplingParams, TokenOutput

REQUESTS, PROMPT, RANK = 16, 32, 16


def random_adapters(engine: TorchEngine, folder: Path) -> list[Path]:
    """In peft's file format, on every target layer of the base."""
    folders = []
    for number in range(REQUESTS):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for target in engine.facts.targets:
            for side, shape in (("A", (RANK, target.in_features)), ("B", (target.out_features, RANK))):
                weights = torch.randn(shape, generator=generator) / shape[1] ** 0.5 * (1.0 if side == "A" else 0.3)
                tensors[f"base_model.model.{target.module}.lora_{side}.weight"] = weights
        own = folder / f"adapter-{number}"
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        names = sorted({target.module.rpartition(".")[2] for target in engine.facts.targets})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names, "task_type": "CAUSAL_LM"}
        (own / "adapter_config.json").write_text(json.dumps(config))
        folders.append(own)
    return folders


@dataclass
class Rate:
    """Tokens a second on the clock, and per second of CPU time: the second stands on a machine that others use too."""

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, run: Callable[[], list[list[int]]]) -> list[list[int]]:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = run()
        count = sum(len(one) for one in tokens)
        self.wall.append(count / (time.perf_counter() - wall))
        self.cpu.append(count / (time.process_time() - cpu))
        return tokens

    def row(self, base: Rate) -> str:
        cells = [f"{self.name:22}"]
        for mine, own in ((self.wall, base.wall), (self.cpu, base.cpu)):
            median = statistics.median(mine)
            spread = f"({min(mine):.1f}..{max(mine):.1f})"
            cells.append(f"{median:7.1f} {spread:17} {median / statistics.median(own):5.2f}")
        return "  ".join(cells)


def run_engine(engine: TorchEngine, prompts: list[list[int]], slots: list[int], new: int) -> list[list[int]]:
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    left = len(prompts)
    for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        engine.submit(GenerationRequest(str(i), tuple(prompt), slot, str(slot), greedy), outputs.put)
    while left:
        output = outputs.get(timeout=300)
        if output.token_id is not None:
            tokens[output.request_id].append(output.token_id)
        left -= output.finish_reason is not None
    return list(tokens.values())


def peft_runner(base: str, folders: list[Path], dtype: torch.dtype, new: int) -> Callable[[list[list[int]]], Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
        model: Any = PeftModel.from_pretrained(stock, folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=str(number))
        model.to(dtype).eval()

    def run(prompts: list[list[int]]) -> list[list[int]]:
        tokens = []
        for i, prompt in enumerate(prompts):
            model.set_adapter(str(i))
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            tokens.append(out[0, len(prompt) :].tolist())
        return tokens

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate per request")
    parser.add_argument(
        "--peft", type=int, default=4, help="requests that peft runs; 0: none, and no proof of equality"
    )
    arguments = parser.parse_args()

    engine = TorchEngine(
        EngineConfig(
            arguments.base,
            dtype=arguments.dtype,
            max_rank=64,
            slots=REQUESTS,
            max_batch=REQUESTS,
            max_model_len=512,
            threads=arguments.threads,
        )
    )
    torch.set_num_threads(arguments.threads or usable_cores())  # peft's, in this thread
    engine.start()
    generator = torch.Generator().manual_seed(0)
    size = (REQUESTS, PROMPT)
    prompts = torch.randint(5, engine.facts.vocab_size - 5, size, generator=generator).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folders = random_adapters(engine, Path(scratch))
        for slot, folder in enumerate(folders):
            outcome = engine.load(slot, engine.read_adapter(str(folder), max_rank=64)).result(60)
            if slot == 0:
                print(
                    f"one adapter: {outcome.device_bytes / 1e6:.1f} MB, into its slot in {outcome.seconds * 1e3:.1f} ms"
                )
        base_slots, distinct = [BASE_SLOT] * REQUESTS, list(range(REQUESTS))
        base, mixed, peft = Rate("base alone"), Rate("16 distinct adapters"), Rate("peft one by one")
        run_engine(engine, prompts, base_slots, arguments.new)
        ours = run_engine(engine, prompts, distinct, arguments.new)
        for _ in range(arguments.rounds):
            base.measure(lambda: run_engine(engine, prompts, base_slots, arguments.new))
            mixed.measure(lambda: run_engine(engine, prompts, distinct, arguments.new))
        engine.stop(10)
        equal = True
        if arguments.peft:
            few, dtype = prompts[: arguments.peft], getattr(torch, arguments.dtype)
            run = peft_runner(arguments.base, folders[: arguments.peft], dtype, arguments.new)
            theirs = peft.measure(lambda: run(few))
            same = sum(a == b for a, b in zip(ours, theirs, strict=False))
            print(f"token sequences equal to peft's: {same} of {len(few)}")
            equal = same == len(few) or arguments.dtype != "float32"
    print(
        f"W1, {arguments.dtype}, {arguments.threads or usable_cores()} threads, load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':22}  tok/s (spread), of base            tok/CPU-s (spread), of base")
    for rate in (base, mixed, peft):
        if rate.wall:
            print(rate.row(base))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
