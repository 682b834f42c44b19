"""Which engine a base gets. An engine's modules are imported only when one is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from lorapool_runtime.engines.interface import Engine
from lorapool_runtime.settings import RuntimeSettings

EngineFactory = Callable[[RuntimeSettings, Path], Engine]
"""(settings, the base's folder) → an engine that is not started yet."""


def make_engine(settings: RuntimeSettings, folder: Path) -> Engine:
    """The engine of the settings for the base in `folder`. Takes seconds, for its imports."""
    return _vllm_engine(settings, folder) if settings.engine == "vllm" else _torch_engine(settings, folder)


def _vllm_engine(settings: RuntimeSettings, folder: Path) -> Engine:
    from lorapool_runtime.engines.vllm.config import EngineConfig
    from lorapool_runtime.engines.vllm.engine import VllmEngine

    own_default = "max_batch_tokens" not in settings.model_fields_set  # made for the torch engine
    return VllmEngine(
        EngineConfig(
            model_dir=str(folder),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_rank=settings.max_rank,
            slots=settings.slots,
            max_batch=settings.max_batch,
            max_batch_tokens=None if own_default else settings.max_batch_tokens,
            kv_bytes=settings.kv_bytes,
            prefix_cache=settings.prefix_cache,
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
            threads=settings.threads,
        )
    )


def _torch_engine(settings: RuntimeSettings, folder: Path) -> Engine:
    from transformers.utils import logging as transformers_logging

    from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

    transformers_logging.disable_progress_bar()
    return TorchEngine(
        EngineConfig(
            model_dir=str(folder),
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=settings.max_model_len,
            max_rank=settings.max_rank,
            slots=settings.slots,
            max_batch=settings.max_batch,
            kv_bytes=settings.kv_bytes,
            max_batch_tokens=settings.max_batch_tokens,
            max_prefill_tokens=settings.max_prefill_tokens,
            prefix_cache=settings.prefix_cache,
            threads=settings.threads,
        )
    )


def import_framework() -> None:
    """Imports torch ahead of `make_engine`, which takes seconds.

    Only torch: two threads must not import packages that import each other.
    """
    with contextlib.suppress(ImportError, OSError):  # `make_engine` meets the same error, and raises it
        import torch  # noqa: F401
