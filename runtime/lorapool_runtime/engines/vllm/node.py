"""A worker of a group: its part of the base on the GPUs of its node. It answers no requests.

It ends with the group: when the leader ends, when vLLM's processes of this node do, or some time after a signal to
stop. Kubernetes signals all pods of a group at once, and the leader still needs the workers for its running requests.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from lorapool_runtime.engines.errors import EngineStartError, GroupError
from lorapool_runtime.engines.vllm.base import read_base
from lorapool_runtime.engines.vllm.config import EngineConfig
from lorapool_runtime.engines.vllm.group import Worker
from lorapool_runtime.engines.vllm.loaded import prepare
from lorapool_runtime.engines.vllm.names import Vllm

log = logging.getLogger(__name__)


class VllmNode:
    """`interface.Node` on vLLM."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.group is not None
        self._config, self._group = config, config.group
        self._over = threading.Event()
        self._failure: EngineStartError | None = None

    def run(self, stop: threading.Event, grace_s: float) -> None:
        """Blocks until the group ends.

        Raises EngineStartError where that has another reason than `stop`, `grace_s` after which it ends in any case.
        """
        vllm = Vllm(self._config)
        worker = Worker.join(self._group, self._config.identity(vllm.version), stop)
        if worker is None:
            return
        thread = threading.Thread(target=self._compute, args=(vllm, worker), name="engine", daemon=True)
        thread.start()
        while not (self._over.wait(0.2) or worker.wait_for_end(0)):
            if stop.is_set():
                worker.wait_for_end(grace_s)
                break
        if stop.is_set():
            return
        raise self._failure or GroupError(worker.end)

    def _compute(self, vllm: Vllm, worker: Worker) -> None:
        try:
            prepared = prepare(vllm, self._config, read_base(Path(self._config.model_dir)))
            worker.ready()
            worker.wait_for_start()
            log.info("worker %d of the group starts vLLM", self._group.index)
            vllm.compute(prepared)
            raise GroupError(f"vLLM's processes of worker {self._group.index} have ended: the group starts again.")
        except Exception as error:
            known = error if isinstance(error, EngineStartError) else EngineStartError(str(error) or repr(error))
            if known is not error:
                log.exception("vLLM does not run on this node")
            worker.failed(str(known), known.reason)
            self._failure = known
        finally:
            self._over.set()
