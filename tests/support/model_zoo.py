"""Tiny random models of many architectures, and whether the torch engine serves each: docs/reference/models.md.

    python tests/support/model_zoo.py            prints what the page would say
    python tests/support/model_zoo.py --write    writes the page

Each is built by transformers, saved as safetensors, loaded by the engine with its self-check, and its greedy tokens are
compared with transformers' own.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "models.md"
NEW_TOKENS = 10
PROMPT = [(7 * i) % 290 + 3 for i in range(9)]
SERVED = "served"
REMEDY = ". Choose a base that docs/reference/models.md lists as served"
"""How each refusal ends; the page leaves it out."""

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_TOKENS = {"vocab_size": 320, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 40}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.2] * 8,
    "original_max_position_embeddings": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = {**_VISION, "image_size": 28, "patch_size": 14}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
_QWEN_TOKENS = {
    "image_token_id": 302,
    "video_token_id": 303,
    "vision_start_token_id": 304,
    "vision_end_token_id": 305,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    """An architecture: its class name in transformers without ForCausalLM, and settings that differ from _COMMON."""

    models: str
    """What is published with it."""
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    """Class of the configuration, where it is not the name and Config."""
    cls: str = ""
    """Class of the model, where it is not the name and ForCausalLM."""
    common: Mapping[str, Any] = field(default_factory=lambda: _COMMON)
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Added to config.json after the model was saved."""

    def build(self) -> Any:
        import transformers

        config = getattr(transformers, self.config or f"{self.name}Config")(**{**self.common, **self.changes})
        torch.manual_seed(3)
        return getattr(transformers, self.cls or f"{self.name}ForCausalLM")(config).eval()


def _multimodal(models: str, name: str, text: Mapping[str, Any], vision: Mapping[str, Any], **rest: Any) -> Case:
    settings = {"text_config": {**_COMMON, **text}, "vision_config": dict(vision), **rest}
    return Case(models, name, settings, cls=f"{name}ForConditionalGeneration", common={})


CASES = (
    Case("Llama 2, TinyLlama, SmolLM 2", "Llama"),
    Case("Llama 3.1, 3.2, 3.3", "Llama", {"rope_parameters": _LLAMA3}),
    Case(
        "Llama 4 (text)", "Llama4", {**_HEAD, "num_local_experts": 2, "intermediate_size_mlp": 96}, "Llama4TextConfig"
    ),
    Case(
        "Llama 3, quantized (AWQ, GPTQ, bitsandbytes, FP8)",
        "Llama",
        stored={"quantization_config": {"bits": 4, "quant_method": "awq"}},
    ),
    Case(
        "Llama with dynamic rope scaling",
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    Case("Qwen 2, 2.5", "Qwen2"),
    Case("Qwen 2.5 with YaRN", "Qwen2", {"rope_parameters": _YARN}),
    Case("Qwen 3", "Qwen3", _HEAD),
    Case("Qwen 3 MoE", "Qwen3Moe", {**_HEAD, **_EXPERTS}),
    Case(
        "Qwen 3 Next",
        "Qwen3Next",
        {**_HEAD, **_EXPERTS, **_LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32},
    ),
    Case("Qwen 3.5 (text)", "Qwen3_5", {**_HEAD, **_LINEAR, "num_hidden_layers": 4}, "Qwen3_5TextConfig"),
    _multimodal("Qwen 2.5 VL", "Qwen2_5_VL", {"rope_parameters": _MROPE}, _QWEN_VISION, **_QWEN_TOKENS),
    _multimodal(
        "Qwen 3 VL",
        "Qwen3VL",
        {**_HEAD, "rope_parameters": _MROPE},
        {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    ),
    Case("Mistral 7B", "Mistral", {**_HEAD, "sliding_window": None}),
    Case("Mistral 7B v0.1 (sliding window)", "Mistral", {**_HEAD, "sliding_window": 8}),
    Case("Ministral 8B", "Ministral", {**_HEAD, "sliding_window": 8}),
    Case("Ministral 3 (text)", "Ministral3", _HEAD),
    _multimodal(
        "Mistral Small 3.1, 3.2",
        "Mistral3",
        {**_HEAD, "model_type": "ministral3"},
        {**_IMAGES, "head_dim": 16, "model_type": "pixtral"},
        image_token_index=302,
    ),
    Case("Mixtral", "Mixtral", {"num_local_experts": 4}),
    Case("Gemma 1", "Gemma", _HEAD),
    Case("Gemma 2", "Gemma2", {**_HEAD, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    Case(
        "Gemma 3 1B",
        "Gemma3",
        {**_HEAD, "sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": _SLIDING_AND_FULL},
        "Gemma3TextConfig",
    ),
    _multimodal(
        "Gemma 3 4B, 12B, 27B",
        "Gemma3",
        {
            **_HEAD,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": _SLIDING_AND_FULL,
            "model_type": "gemma3_text",
        },
        {**_IMAGES, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
    ),
    Case(
        "Gemma 3n (text)",
        "Gemma3n",
        {**_HEAD, "sliding_window": 6, "num_kv_shared_layers": 0, "layer_types": _SLIDING_AND_FULL},
        "Gemma3nTextConfig",
    ),
    Case("Gemma 4 (text)", "Gemma4", {**_HEAD, "sliding_window": 6}, "Gemma4TextConfig"),
    Case("Phi 1.5, Phi 2", "Phi"),
    Case("Phi 3 mini 4k, Phi 4", "Phi3"),
    Case("Phi 3 mini 128k, Phi 4 mini", "Phi3", {"rope_parameters": _LONG}),
    Case("OLMo 1", "Olmo"),
    Case("OLMo 2", "Olmo2"),
    Case("OLMo 3", "Olmo3", {"num_hidden_layers": 4, "sliding_window": 8}),
    Case("OLMoE", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Case("Granite 3", "Granite"),
    Case("Granite 3 MoE", "GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case(
        "Granite 4 (hybrid)",
        "GraniteMoeHybrid",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
        },
    ),
    Case("gpt-oss", "GptOss", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    Case("DeepSeek V2", "DeepseekV2", {**_LATENT, "q_lora_rank": None}),
    Case("DeepSeek V3, R1", "DeepseekV3", {**_LATENT, "q_lora_rank": 16, "n_group": 1, "topk_group": 1}),
    Case("SmolLM 3", "SmolLM3", {"num_hidden_layers": 4}),
    Case("GLM 4", "Glm4", _HEAD),
    Case(
        "GLM 4.5, 4.6",
        "Glm4Moe",
        {
            **_HEAD,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Case("Command R", "Cohere"),
    Case("Command R7B, Command A", "Cohere2", {"num_hidden_layers": 4, "sliding_window": 8}),
    Case("Falcon 7B, 40B", "Falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("StarCoder 2", "Starcoder2"),
    Case("Pythia, GPT-NeoX", "GPTNeoX"),
    Case(
        "GPT-2",
        "GPT2",
        {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160},
        cls="GPT2LMHeadModel",
        common={},
    ),
    Case(
        "OPT",
        "OPT",
        {
            **_TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 160,
            "word_embed_proj_dim": 64,
        },
        common={},
    ),
    Case("BLOOM", "Bloom", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, common={}),
    Case("Nemotron", "Nemotron"),
    Case("EXAONE 4", "Exaone4", {"num_hidden_layers": 4, "sliding_window": 8}),
    Case("LFM 2", "Lfm2", {"layer_types": ["conv", "full_attention"]}),
    Case("Seed-OSS", "SeedOss", _HEAD),
    Case("ERNIE 4.5", "Ernie4_5", _HEAD),
    Case("Hunyuan (dense)", "HunYuanDenseV1", _HEAD),
    Case("MiniMax M2", "MiniMaxM2", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("Apertus", "Apertus"),
)


def outcome(case: Case, folder: Path) -> str:
    """SERVED, or the words of the refusal. Raises what is neither."""
    import json

    from engine_kit import greedy, request

    from lorapool_runtime.engines.errors import UnsupportedBaseError
    from lorapool_runtime.engines.torch.config import EngineConfig
    from lorapool_runtime.engines.torch.core import Core

    model = case.build()
    model.save_pretrained(folder)
    if case.stored:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | case.stored))
    config = EngineConfig(
        str(folder),
        dtype="float32",
        device="cpu",
        threads=1,
        slots=2,
        max_batch=4,
        max_batch_tokens=32,
        kv_bytes=4 << 20,
    )
    try:
        with torch.no_grad():
            core = Core(config)
    except UnsupportedBaseError as error:
        words = str(error)
        assert words.endswith(REMEDY), words
        return f"refused: {words.removesuffix(REMEDY)}"
    with torch.inference_mode():
        core.add(request("a", PROMPT, greedy(NEW_TOKENS)))
        got = []
        while core.scheduler.has_work:
            got += [output.token_id for output in core.step()]
        ids = torch.tensor([PROMPT])
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    wanted = out[0, len(PROMPT) :].tolist()
    assert got == wanted, f"{case.models}: greedy tokens are {got}, transformers' {wanted}"
    return SERVED


def model_type(case: Case) -> str:
    import transformers

    return str(getattr(transformers, case.config or f"{case.name}Config").model_type)


def page(outcomes: Mapping[str, str]) -> str:
    vllm = {}
    for line in PAGE.read_text().splitlines():  # the last column is of `vllm_zoo`, in another environment
        first, *_, last = line.strip("| ").split(" | ")
        vllm[first] = last
    rows = [
        f"| {case.models} | `{model_type(case)}` | {outcomes[case.models]} | {vllm.get(case.models, 'not tested')} |"
        for case in CASES
    ]
    head = f"""<!-- Written by `python tests/support/model_zoo.py --write` from a run. Do not edit. -->

# Which bases are served

Each line is a run with a tiny random model of the architecture: transformers builds it, the engine loads it with its
self-check, and {NEW_TOKENS} greedy tokens must equal transformers' own. A base of an architecture that is not here
may work too, since none is recognized by its name: what cannot be computed exactly is refused at the start, in the
words below, followed by "Choose a base that docs/reference/models.md lists as served". Which adapters a served base
takes: [what is exact](../explanation/what-is-exact.md).

The column of vLLM is from `tests/support/vllm_zoo.py`, on vLLM's build for CPUs, version 0.32.0, with models twice as
wide: greedy tokens of the base equal transformers', and those with an adapter of its attention layers peft's. Where
that build does not compute the tiny model, which often needs Triton, it says "not tested": on a GPU it may be served.

| models | `model_type` | torch engine | vLLM engine |
|---|---|---|---|
"""
    return head + "".join(f"{row}\n" for row in rows)


def run(cases: tuple[Case, ...]) -> dict[str, str]:
    outcomes = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes[case.models] = outcome(case, Path(folder))
            except Exception as error:
                outcomes[case.models] = f"FAILED: {type(error).__name__}: {error}"
        print(f"{case.models}: {outcomes[case.models]}", flush=True)
    return outcomes


def main() -> int:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    only = [word for word in sys.argv[1:] if word != "--write"]
    outcomes = run(tuple(case for case in CASES if not only or any(word in case.models for word in only)))
    if any(words.startswith("FAILED") for words in outcomes.values()):
        return 1
    if "--write" in sys.argv:
        PAGE.write_text(page(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
