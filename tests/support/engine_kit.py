"""Tiny random bases and adapters made by peft, and peft's own answers, for the engine's tests."""

from __future__ import annotations

import copy
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams, TokenOutput
from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

VOCAB = 320
_BOTH = ["sliding_attention", "full_attention"]
MAX_LEN = 160
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random model of an architecture, the same at every call."""
    import transformers

    own: dict[str, Any] = {
        "Llama": {"tie_word_embeddings": True},
        "Qwen2": {},
        "Qwen3": {"head_dim": 32},
        "Mistral": {"sliding_window": 7},
        "Gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        "Gemma3": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": _BOTH},
        "Phi3": {"sliding_window": 9},
        "Olmo2": {},
        "Granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        "Qwen3Moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "Mixtral": {"num_local_experts": 4, "sliding_window": 8},
        "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    }[architecture]
    name = "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, name)(**COMMON | own | changes)
    torch.manual_seed(11)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@dataclass
class PeftWorld:
    """A base folder, adapters saved by peft, and the models that made them as the reference."""

    base: Path
    adapters: dict[str, Path]
    models: dict[str | None, Any]
    """By adapter; None is the base alone."""
    _answers: dict[tuple[str | None, tuple[int, ...], int], list[int]] = field(default_factory=dict)

    def answer(self, adapter: str | None, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy answer of transformers' own generate, one prompt at a time."""
        key = (adapter, tuple(prompt), max_tokens)
        if key not in self._answers:
            ids = torch.tensor([list(prompt)])
            with torch.no_grad():
                out = self.models[adapter].generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self._answers[key] = [int(token) for token in out[0, len(prompt) :]]
        return self._answers[key]


def peft_world(folder: Path, model: Any, configs: dict[str, dict[str, Any]]) -> PeftWorld:
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    models: dict[str | None, Any] = {None: model}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on newer transformers
        for number, (name, config) in enumerate(configs.items()):
            torch.manual_seed(100 + number)
            own = LoraConfig(**{"init_lora_weights": False, "lora_dropout": 0.0} | config)
            models[name] = get_peft_model(copy.deepcopy(model), own).eval()
            models[name].save_pretrained(str(folder / name))
    return PeftWorld(folder / "base", {name: folder / name for name in configs}, models)


def save_adapter(folder: Path, model: Any, **config: Any) -> Path:
    """One adapter saved by peft, for tests that modify its files."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        get_peft_model(copy.deepcopy(model), LoraConfig(**{"init_lora_weights": False} | config)).save_pretrained(
            str(folder)
        )
    return folder


class Collector:
    """A sink that collects the outputs of many requests and lets a test wait for their ends."""

    def __init__(self, *, pause_s: float = 0.0) -> None:
        """pause_s: slept in the engine thread at each output, so that a request lasts as long as a test needs."""
        self.outputs: dict[str, list[TokenOutput]] = {}
        self._pause_s = pause_s
        self._queue: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def __call__(self, output: TokenOutput) -> None:
        with self._lock:
            self.outputs.setdefault(output.request_id, []).append(output)
        self._queue.put(output)
        time.sleep(self._pause_s)

    def next(self, timeout_s: float = 60.0) -> TokenOutput:
        return self._queue.get(timeout=timeout_s)

    def wait(self, ids: Iterable[str], timeout_s: float = 60.0) -> None:
        left = {i for i in ids if not self.ended(i)}
        while left:
            output = self.next(timeout_s)
            if output.finish_reason is not None:
                left.discard(output.request_id)

    def ended(self, request_id: str) -> bool:
        with self._lock:
            got = self.outputs.get(request_id, [])
            return bool(got) and got[-1].finish_reason is not None

    def last(self, request_id: str) -> TokenOutput:
        return self.outputs[request_id][-1]

    def tokens(self, request_id: str) -> list[int]:
        return [o.token_id for o in self.outputs[request_id] if o.token_id is not None]


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True} | changes)


def request(
    request_id: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    slot: int = BASE_SLOT,
    salt: str | None = None,
) -> GenerationRequest:
    """`salt` must differ between adapters that use the same slot in turn, because it identifies cached blocks."""
    cache_salt = salt or ("base" if slot == BASE_SLOT else f"slot-{slot}")
    return GenerationRequest(request_id, tuple(prompt), slot, cache_salt, sampling)


THREADS = int(os.environ.get("LORAPOOL_TEST_THREADS", "1"))


def started(base: Path, **changes: Any) -> TorchEngine:
    """In float32 unless `changes` says otherwise: what `auto` chooses depends on the processor."""
    settings: dict[str, Any] = {"max_rank": 16, "slots": 6, "max_batch": 24, "max_batch_tokens": 64}
    settings |= {"threads": THREADS, "dtype": "float32"}
    engine = TorchEngine(EngineConfig(model_dir=str(base), device="cpu", **settings | changes))
    engine.start()
    return engine
