"""W1 in process: 16 requests of 32 prompt and 64 new tokens, on the base alone and over 16 distinct rank-16 adapters.

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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorapool_runtime.cores import usable_cores
from lorapool_runtime.engine import EngineConfig, TorchEngine
from lorapool_runtime.interface import BASE_SLOT, GenerationRequest, SamplingParams, TokenOutput

REQUESTS, PROMPT, NEW, RANK = 16, 32, 64, 16
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)


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


def run_engine(engine: TorchEngine, prompts: list[list[int]], slots: list[int]) -> tuple[float, list[list[int]]]:
    outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    begin, left = time.perf_counter(), len(prompts)
    for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        engine.submit(GenerationRequest(str(i), tuple(prompt), slot, str(slot), GREEDY), outputs.put)
    while left:
        output = outputs.get(timeout=300)
        if output.token_id is not None:
            tokens[output.request_id].append(output.token_id)
        left -= output.finish_reason is not None
    return time.perf_counter() - begin, list(tokens.values())


def peft_runner(base: str, folders: list[Path], dtype: torch.dtype) -> Callable[[list[list[int]]], tuple[float, Any]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
        model: Any = PeftModel.from_pretrained(stock, folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=str(number))
        model.to(dtype).eval()

    def run(prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        begin, tokens = time.perf_counter(), []
        for i, prompt in enumerate(prompts):
            model.set_adapter(str(i))
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            tokens.append(out[0, len(prompt) :].tolist())
        return time.perf_counter() - begin, tokens

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--rounds", type=int, default=3)
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
        rates: dict[str, list[float]] = {"base alone": [], "16 distinct adapters": [], "peft one by one": []}
        run_engine(engine, prompts, base_slots)
        _, ours = run_engine(engine, prompts, distinct)
        for _ in range(arguments.rounds):
            rates["base alone"].append(REQUESTS * NEW / run_engine(engine, prompts, base_slots)[0])
            rates["16 distinct adapters"].append(REQUESTS * NEW / run_engine(engine, prompts, distinct)[0])
        equal = True
        if arguments.peft:
            run = peft_runner(arguments.base, folders[: arguments.peft], getattr(torch, arguments.dtype))
            seconds, theirs = run(prompts[: arguments.peft])
            rates["peft one by one"].append(arguments.peft * NEW / seconds)
            same = sum(a == b for a, b in zip(ours, theirs, strict=False))
            print(f"token sequences equal to peft's: {same} of {arguments.peft}")
            equal = same == arguments.peft or arguments.dtype != "float32"
    engine.stop(10)
    own = statistics.median(rates["base alone"])
    print(f"W1, {arguments.dtype}, load average {os.getloadavg()[0]:.1f}")
    for name, found in rates.items():
        if found:
            median = statistics.median(found)
            spread = f"({min(found):.1f}..{max(found):.1f})"
            print(f"{name:24} {median:7.1f} tok/s  {spread:18} {median / own:5.2f} of the base alone")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
