"""Loads the base and prepares it for shared use: the one module that knows transformers' private names.

No architecture is recognized by its name. A probe run of the stock model shows what adapters may change (`probe`) and
which parameters every attention layer has; the layers are then replaced, and the engine compares the result with the
stock logits before it serves. Reads safetensors from a local folder only, and runs no code from it. Bases that cannot
be computed exactly are refused with a message that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)

from lorapool_api.base_modules import BaseModule
from lorapool_runtime.engines.errors import EngineStartError, UnsupportedBaseError
from lorapool_runtime.engines.torch.lora.layer import LoraBatch
from lorapool_runtime.engines.torch.model.attention import (
    Attention,
    LayerAttention,
    ProbeAttention,
    UnsupportedAttentionError,
)
from lorapool_runtime.engines.torch.model.key_map import KeyMap
from lorapool_runtime.engines.torch.model.lora_modules import fit_lora
from lorapool_runtime.engines.torch.model.native_modules import replace_with_native
from lorapool_runtime.engines.torch.model.probe import ProbeResult, adaptable, run_probe
from lorapool_runtime.engines.torch.model.stored import stored_matrices, tensors_in
from lorapool_runtime.weights.originals import StoredMatrix
from lorapool_runtime.weights.targets import TargetGroup

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})

ATTENTION_NAME = "lorapool_paged"
ATTENTION_KWARG = "lorapool_attention"
_HARMLESS_KWARGS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    }
)
"""Arguments that architectures pass to their attention although they do not change the result."""


@dataclass(frozen=True, slots=True)
class Base:
    model: nn.Module
    groups: tuple[TargetGroup, ...]
    modules: tuple[BaseModule, ...]
    """All modules that adapters may name."""
    originals: Mapping[str, StoredMatrix]
    """Of the embedding and the output layer, by module: where the files have the weight."""
    lora: LoraBatch
    layers: tuple[LayerAttention, ...]
    probe: ProbeResult
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int
    query_heads: int
    eos_token_ids: frozenset[int]
    weight_bytes: int

    def logits(self, token_ids: Tensor, positions: Tensor, keep: Tensor, attend: Attention) -> Tensor:
        """Runs the model. token_ids, positions: [tokens] of all sequences; keep: [rows] -> [rows, vocabulary]."""
        out = self.model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
            **{ATTENTION_KWARG: attend},
        )
        logits: Tensor = out.logits[0]
        return logits


def load_base(folder: str, *, dtype: str, device: torch.device) -> Base:
    """Loads the base in `folder`. Raises UnsupportedBaseError, and OSError or ValueError for a broken folder.

    At most the weights and one group of fused layers are in memory at one time.
    """
    with refusing():
        config = checked_config(folder)
        element = element_type(config, dtype, device)
        return _fitted(stock_model(folder, config, element, device), folder, config, element, device)


def stock_model(folder: str, config: Any, element: torch.dtype, device: torch.device) -> Any:
    """The model as transformers has it, on the device.

    Where the files have the wanted type, the host maps them and allocates nothing.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=element, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.requires_grad_(False)
    return model.eval().to(device)


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what transformers raises for a model that it cannot run into an UnsupportedBaseError, and adds a remedy.

    Errors of files (OSError, SafetensorError), of memory and of the device are raised as they are.
    """
    try:
        yield
    except UnsupportedBaseError as error:
        raise UnsupportedBaseError(f"{error}. {_REMEDY}") from error.__cause__
    except (EngineStartError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except _OF_TRANSFORMERS as error:
        log.info("transformers cannot run this base", exc_info=error)
        raise UnsupportedBaseError(f"transformers cannot run it here ({_short(error)}). {_REMEDY}") from error


_REMEDY = "Choose a base that docs/reference/models.md lists as served"
_OF_TRANSFORMERS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _fitted(model: Any, folder: str, config: Any, element: torch.dtype, device: torch.device) -> Base:
    text = config.get_text_config()
    max_positions = getattr(text, "max_position_embeddings", None)
    if max_positions is None:
        raise UnsupportedBaseError("its config has no max_position_embeddings, as where attention has biases (ALiBi)")
    register_attention()
    probe, calls = run_probe(model, device)
    files = tensors_in(Path(folder))
    key_map = KeyMap(model, files)
    found = adaptable(model, calls, key_map)
    del calls  # refers to weights, which could not be freed one group after the other
    if not found.groups:
        raise UnsupportedBaseError("the base has no linear layers that LoRA could target")
    originals = stored_matrices(model, found.modules, files, key_map)
    lora = LoraBatch()
    groups, fused_bytes = fit_lora(model, found, lora)
    replace_with_native(model)
    model.set_attn_implementation(ATTENTION_NAME)
    base = Base(
        model=model,
        groups=groups,
        modules=found.modules,
        originals=originals,
        lora=lora,
        layers=(),
        probe=probe,
        dtype=element,
        device=device,
        vocab_size=probe.logits.shape[-1],
        max_positions=int(max_positions),
        query_heads=int(text.num_attention_heads),
        eos_token_ids=_eos_token_ids(folder, config),
        weight_bytes=sum(p.nbytes for p in model.parameters()) + fused_bytes,
    )
    return _with_layers(base, text)


def register_attention() -> None:
    """Makes `ATTENTION_NAME` known to transformers: a model with it calls the `Attention` that its caller passes."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def checked_config(folder: str) -> Any:
    """The base's configuration. Raises UnsupportedBaseError for one whose attention is not computed."""
    if not any(Path(folder).glob("*.safetensors")):
        raise EngineStartError(f"{folder} has no *.safetensors: save the base as safetensors, no other format is read")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedBaseError(
            f"transformers has no text model for the type {config.model_type}, only one for several kinds of input"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedBaseError("the base is quantized; serve it in float32, bfloat16 or float16")
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (ropes, *ropes.values()) if isinstance(r, dict)}
    if kinds & _BATCH_DEPENDENT_ROPES:
        raise UnsupportedBaseError(
            f"rope type {(kinds & _BATCH_DEPENDENT_ROPES).pop()} depends on the longest sequence in the batch; "
            "not supported"
        )
    unknown = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedBaseError(f"layers of type {', '.join(sorted(unknown))} are not supported")
    return config


def element_type(config: Any, dtype: str, device: torch.device) -> torch.dtype:
    """The torch type for `dtype`. auto: as stored, but float32 on a CPU that could only emulate the stored type."""
    if dtype != "auto":
        return _DTYPES[dtype]
    stored = getattr(config.get_text_config(), "dtype", None) or config.dtype
    stored = stored if isinstance(stored, torch.dtype) else _DTYPES.get(str(stored), torch.float32)
    if device.type == "cpu" and not cpu_computes_in(stored, torch.cpu.get_capabilities()):
        if stored in _CPU_INSTRUCTIONS:
            log.info("the base is served in float32: this CPU has no instructions for %s", stored)
        return torch.float32
    return stored


_CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""Names as `torch.cpu.get_capabilities` reports them, on x86 and Arm."""


def cpu_computes_in(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> bool:
    """Whether the CPU has multiply instructions for a 16-bit type.

    oneDNN's own check cannot be used: it is also true where oneDNN emulates the type with AVX-512.
    """
    return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS.get(dtype, ()))


def _with_layers(base: Base, text: Any) -> Base:
    """Runs the modified model once to record the parameters of its attention layers. Raises UnsupportedBaseError."""
    observed = ProbeAttention()
    ids = torch.tensor(base.probe.token_ids, device=base.device)
    base.logits(ids, torch.arange(len(ids), device=base.device), torch.tensor([0], device=base.device), observed)
    count = int(text.num_hidden_layers)
    if observed.layers.keys() != set(range(count)):
        raise UnsupportedBaseError(
            f"{len(observed.layers)} of {count} layers use attention that this engine can replace"
        )
    layers = tuple(observed.layers[i] for i in range(count))
    if len({(layer.kv_heads, layer.head_dim) for layer in layers}) != 1:
        raise UnsupportedBaseError("layers with different numbers of key heads or head sizes are not supported")
    for number, kind in enumerate(getattr(text, "layer_types", None) or ()):
        if kind == "sliding_attention" and layers[number].window is None:
            raise UnsupportedBaseError(
                f"the sliding window of layer {number} is not passed to its attention; not supported"
            )
    return replace(base, layers=layers)


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers, which calls it for every layer.

    The batch is passed through the model's keyword arguments, so there is no global state.
    """
    attention: Attention | None = rest.pop(ATTENTION_KWARG, None)
    if attention is None:
        raise UnsupportedAttentionError(f"{type(module).__name__} does not pass keyword arguments to its attention")
    unknown = sorted(name for name, value in rest.items() if value is not None and name not in _HARMLESS_KWARGS)
    if unknown or attention_mask is not None or dropout:
        named = ", ".join(unknown) or ("attention_mask" if attention_mask is not None else "dropout")
        raise UnsupportedAttentionError(f"{type(module).__name__} needs {named}, which this engine does not compute")
    layer: int = module.layer_idx  # type: ignore[assignment]  # set by every transformers attention module
    wants = LayerAttention(kv_heads=k.shape[1], head_dim=k.shape[3], window=sliding_window, softcap=softcap)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.attend(layer, q, k, v, scale, wants), None


def text_settings(base: Base) -> dict[str, Any]:
    """The (nested) configuration of the base's language model."""
    config: Any = base.model.config
    return dict(config.get_text_config().to_dict())


def _eos_token_ids(folder: str, config: Any) -> frozenset[int]:
    value = config.get_text_config().eos_token_id
    if (Path(folder) / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        value = generation.eos_token_id if generation.eos_token_id is not None else value
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])
