"""Which engine a base gets. An engine's modules are imported only when one is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lorapool_runtime.engines.interface import Engine
from lorapool_runtime.engines.step_shares import StepWeights
from lorapool_runtime.settings import RuntimeSettings

EngineFactory = Callable[[RuntimeSettings, Path], Engine]
"""(settings, the base's folder) → an engine that is not started yet."""


class Node(Protocol):
    """The part of one node in computing a base, for a leader that answers the requests."""

    def run(self, stop: threading.Event, grace_s: float) -> None:
        """Blocks until the group ends. After `stop` is set it goes on for at most `grace_s`, since the leader may
        still have requests.

        Raises EngineStartError where the group ends for another reason than `stop`.
        """
        ...


def make_engine(settings: RuntimeSettings, folder: Path) -> Engine:
    """The engine of the settings for the base in `folder`. Takes seconds, for its imports."""
    if settings.engine == "vllm":
        from lorapool_runtime.engines.vllm.engine import VllmEngine

        return VllmEngine(_vllm_config(settings, folder))
    from transformers.utils import logging as transformers_logging

    from lorapool_runtime.engines.torch.engine import EngineConfig, TorchEngine

    transformers_logging.disable_progress_bar()
    return TorchEngine(
        EngineConfig(
            **_common(settings, folder),
            device=settings.device,
            max_batch_tokens=settings.max_batch_tokens,
            max_prefill_tokens=settings.max_prefill_tokens,
        )
    )


def make_node(settings: RuntimeSettings, folder: Path) -> Node:
    """The part of a group's worker in computing the base in `folder`."""
    from lorapool_runtime.engines.vllm.node import VllmNode

    return VllmNode(_vllm_config(settings, folder))


def _vllm_config(settings: RuntimeSettings, folder: Path) -> Any:
    from lorapool_runtime.engines.vllm.config import EngineConfig, Group

    own_default = "max_batch_tokens" not in settings.model_fields_set  # made for the torch engine
    group = None
    if settings.group_size > 1:
        assert settings.group_leader is not None  # the settings are validated
        group = Group(settings.group_size, settings.group_index, settings.group_leader, settings.group_port)
    return EngineConfig(
        **_common(settings, folder),
        max_batch_tokens=None if own_default else settings.max_batch_tokens,
        tensor_parallel=settings.tensor_parallel,
        pipeline_parallel=settings.pipeline_parallel,
        group=group,
    )


def _step_weights(settings: RuntimeSettings) -> StepWeights:
    return StepWeights.of_ns(
        prefill=settings.cost_prefill_ns,
        decode=settings.cost_decode_ns,
        context=settings.cost_context_ns,
        rank=settings.cost_rank_ns,
    )


def _common(settings: RuntimeSettings, folder: Path) -> dict[str, Any]:
    """What both engines' settings have, by the same names."""
    names = ("dtype", "max_model_len", "max_rank", "slots", "max_batch", "kv_bytes", "prefix_cache", "threads")
    weights = _step_weights(settings)
    return {"model_dir": str(folder), "step_weights": weights, **{name: getattr(settings, name) for name in names}}


def import_framework() -> None:
    """Imports torch ahead of `make_engine`, which takes seconds.

    Only torch: two threads must not import packages that import each other.
    """
    with contextlib.suppress(ImportError, OSError):  # `make_engine` meets the same error, and raises it
        import torch  # noqa: F401
