"""W1 on a GPU: 32 requests of 32 prompt and 64 new tokens on an 8B Llama's shape with random weights, in bfloat16.

    python bench/gpu_closed_batch.py [--rounds 3] [--peft 4] [--folder DIR] [--records PATH]  needs a CUDA GPU of 48 GB
    python bench/gpu_closed_batch.py --rehearse    the same with a tiny shape on the CPU: checks that it runs, no figure

Alternating rounds measure the base with nothing loaded, the base with 32 adapters loaded, 1, 8 and 32 distinct rank-16
adapters on all seven linears, and peft's set_adapter one request at a time (on `--peft` of the requests). Before that,
greedy tokens of a small float32 model must equal peft's on the same device, or nothing is measured.
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.records import Record, against, alternate, measured, not_run, parsed, parser, table, write_records
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams, TokenOutput
from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

REQUESTS, PROMPT_TOKENS, RANK = 32, 32, 16
DISTINCT = (1, 8, 32)
PREFIX = "gpu_w1.bf16"


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=1,
            eos_token_id=2,
        )


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256)
SMALL = Shape(256, 512, 2, 8, 2, 1000)


def make_base(folder: Path, shape: Shape, dtype: torch.dtype, device: str) -> str:
    """Writes a folder of random weights, generated on the device: on a CPU 8 billion normal numbers take minutes."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return str(folder)


def make_adapters(folder: Path, engine: TorchEngine, count: int, dtype: torch.dtype) -> list[Path]:
    """Writes adapters in peft's file format, on every linear of the layers."""
    names = sorted({target.module.rpartition(".")[2] for target in engine.facts.targets})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names, "task_type": "CAUSAL_LM"}
    folders = []
    for number in range(count):
        generator, tensors = torch.Generator().manual_seed(number), {}
        for target in engine.facts.targets:
            for side, shape in (("A", (RANK, target.in_features)), ("B", (target.out_features, RANK))):
                weights = torch.randn(shape, generator=generator) / shape[1] ** 0.5 * (1.0 if side == "A" else 0.3)
                tensors[f"base_model.model.{target.module}.lora_{side}.weight"] = weights.to(dtype)
        own = folder / f"adapter-{number}"
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(config))
        folders.append(own)
    return folders


class Ours:
    """The engine, with its adapters read once: copying them into slots is never timed."""

    def __init__(self, base: str, dtype: str, device: str, scratch: Path, count: int) -> None:
        # kv_bytes: many times what the workload needs, while leaving room for peft's own copy of the base
        self._engine = TorchEngine(
            EngineConfig(
                base,
                dtype=dtype,  # type: ignore[arg-type]  # one of the four
                device=device,  # type: ignore[arg-type]
                max_rank=RANK,
                slots=count,
                max_batch=REQUESTS,
                max_batch_tokens=REQUESTS * PROMPT_TOKENS,
                max_model_len=512,
                kv_bytes=2 << 30 if device == "cuda" else 64 << 20,
            )
        )
        began_s = time.perf_counter()
        self._engine.start()
        self.start_s = time.perf_counter() - began_s
        self.vocab = self._engine.facts.vocab_size
        print(f"decode steps: {self._engine.facts.decode_program}")  # a graph that was not captured explains a slow run
        self.folders = make_adapters(scratch, self._engine, count, getattr(torch, dtype))
        self._host = [self._engine.read_adapter(str(folder), max_rank=RANK) for folder in self.folders]
        self._loaded = False

    def load(self, loaded: bool) -> None:
        if loaded != self._loaded:
            for slot, adapter in enumerate(self._host):
                if loaded:
                    self._engine.load(slot, adapter).result(60)
                else:
                    self._engine.unload(slot).result(60)
        self._loaded = loaded

    def run(self, prompts: Sequence[list[int]], slots: Sequence[int], new: int) -> list[list[int]]:
        greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        outputs: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        tokens: dict[str, list[int]] = {str(row): [] for row in range(len(prompts))}
        for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            salt = "base" if slot == BASE_SLOT else f"adapter-{slot}"
            self._engine.submit(GenerationRequest(str(row), tuple(prompt), slot, salt, greedy), outputs.put)
        left = len(prompts)
        while left:
            output = outputs.get(timeout=300)
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.token_id is not None:
                tokens[output.request_id].append(output.token_id)
            left -= output.finish_reason is not None
        return list(tokens.values())

    def stop(self) -> None:
        self._engine.stop(10)


class Peft:
    """The simple baseline: set_adapter, one request at a time."""

    def __init__(self, base: str, folders: Sequence[Path], dtype: torch.dtype, device: str) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = LlamaForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
            self._model: Any = PeftModel.from_pretrained(stock, folders[0], adapter_name="0")
            for number, folder in enumerate(folders[1:], start=1):
                self._model.load_adapter(folder, adapter_name=str(number))
            self._model.to(device, dtype).eval()
        self._device = device

    def run(self, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        tokens = []
        for row, prompt in enumerate(prompts):
            self._model.set_adapter(str(row))
            ids = torch.tensor([prompt], device=self._device)
            options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
                )
            tokens.append(out[0, len(prompt) :].tolist())
        return tokens


def make_prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocab - 5, (REQUESTS, PROMPT_TOKENS), generator=draw).tolist()


def equal_to_peft(device: str, scratch: Path) -> bool:
    """Compares four adapters in one batch with base rows, in float32, on the device under test."""
    base = make_base(scratch / "small", SMALL, torch.float32, device)
    ours = Ours(base, "float32", device, scratch, count=4)
    try:
        ours.load(True)
        prompts = make_prompts(ours.vocab)[:6]
        got = ours.run(prompts, [0, 1, 2, 3, BASE_SLOT, BASE_SLOT], 16)
        return got[:4] == Peft(base, ours.folders, torch.float32, device).run(prompts[:4], 16)
    finally:
        ours.stop()


def tokens_per_s(run: Callable[[], list[list[int]]]) -> float:
    began_s = time.perf_counter()
    count = sum(len(tokens) for tokens in run())  # tokens are on the host when they are counted: nothing is pending
    return count / (time.perf_counter() - began_s)


def measure(shape: Shape, device: str, scratch: Path, rounds: int, new: int, peft_requests: int) -> list[Record]:
    dtype = torch.bfloat16
    base = str(scratch / "base")
    if not (scratch / "base" / "config.json").is_file():
        make_base(scratch / "base", shape, dtype, device)
    with tempfile.TemporaryDirectory(dir=scratch) as adapters:
        ours = Ours(base, "bfloat16", device, Path(adapters), count=max(DISTINCT))
        seeds = itertools.count(1)  # new prompts for every run, so that no prefix cache helps anybody

        def engine(slots: list[int], loaded: bool) -> Callable[[], float]:
            def run() -> float:
                ours.load(loaded)
                prompts = make_prompts(ours.vocab, next(seeds))
                return tokens_per_s(lambda: ours.run(prompts, slots, new))

            return run

        on_base = [BASE_SLOT] * REQUESTS
        engines = {"unloaded": engine(on_base, False), "base": engine(on_base, True)}
        for n in DISTINCT:
            engines[f"distinct{n}"] = engine([row % n for row in range(REQUESTS)], True)
        if peft_requests:
            few = make_prompts(ours.vocab)[:peft_requests]
            peft = Peft(base, ours.folders[:peft_requests], dtype, device)
            engines["peft"] = lambda: tokens_per_s(lambda: peft.run(few, new))
        try:
            runs = alternate(engines, rounds)
        finally:
            ours.stop()
    records = [measured(f"{PREFIX}.start", "s", [ours.start_s], "weights on disk to ready, graphs captured")]
    records.append(against(f"{PREFIX}.base_loaded", "tok/s", runs["base"], "nothing loaded", runs["unloaded"]))
    for n in DISTINCT:
        records.append(against(f"{PREFIX}.distinct{n}_over_base", "tok/s", runs[f"distinct{n}"], "base", runs["base"]))
    if peft_requests:
        most = f"distinct{max(DISTINCT)}"
        records.append(against(f"{PREFIX}.{most}_over_peft", "tok/s", runs[most], "peft set_adapter", runs["peft"]))
    return records


def main() -> int:
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--new", type=int, default=64, help="tokens to generate per request")
    asked.add_argument("--peft", type=int, default=4, help="requests that peft runs; 0: none")
    asked.add_argument("--folder", type=Path, help="keeps the base's 16 GB of random weights for the next time")
    asked.add_argument("--rehearse", action="store_true")
    arguments = parsed(asked)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.rehearse:
        print("bench/gpu_closed_batch.py needs a CUDA GPU and there is none here: nothing was measured.")
        records = [not_run(f"{PREFIX}.distinct{n}_over_base", "tok/s", "no CUDA GPU") for n in DISTINCT]
    else:
        device, shape = ("cpu", SMALL) if arguments.rehearse else ("cuda", LLAMA_8B)
        card = torch.cuda.get_device_name(0) if device == "cuda" else "no card: a rehearsal, these are no figures"
        print(f"W1, {REQUESTS} requests, bfloat16, torch {torch.__version__}, {card}")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            if not equal_to_peft(device, Path(scratch)):
                print("greedy tokens in float32 differ from peft's: nothing was measured")
                return 1
            print("greedy tokens in float32 equal peft's")
            folder = arguments.folder or Path(scratch)
            records = measure(shape, device, folder, arguments.rounds, arguments.new, arguments.peft)
        print(table(records))
        if arguments.rehearse:
            return 0
    if arguments.records:
        write_records(arguments.records, records, {"torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
