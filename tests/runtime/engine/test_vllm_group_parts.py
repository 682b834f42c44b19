"""What a group of runtimes and vLLM's own processes need, without vLLM: their connections, and why a start failed."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lorapool_api.common import Reason
from lorapool_api.settings import SettingsError
from lorapool_runtime.engines.errors import EngineStartError, GroupError
from lorapool_runtime.engines.vllm import child, node
from lorapool_runtime.engines.vllm.causes import cause_of
from lorapool_runtime.engines.vllm.config import EngineConfig, Group
from lorapool_runtime.engines.vllm.group import Leader, Worker
from lorapool_runtime.settings import read_settings

SECONDS = 20.0


def free_pair() -> int:
    """A free port whose next one is free too, both below those that the system gives to connections."""
    while True:
        port = random.randrange(10_000, 20_000, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("", port))
            two.bind(("", port + 1))
            return port


class Lost:
    """Takes the leader's report."""

    def __init__(self) -> None:
        self.failures: list[EngineStartError] = []
        self.reported = threading.Event()

    def __call__(self, failure: EngineStartError) -> None:
        self.failures.append(failure)
        self.reported.set()


@pytest.fixture
def lost() -> Lost:
    return Lost()


@pytest.fixture
def port() -> int:
    return free_pair()


@pytest.fixture
def leader(port: int, lost: Lost) -> Iterator[Leader]:
    made = Leader(Group(3, 0, "127.0.0.1", port), "same", lost)
    yield made
    made.close()


def join(port: int, index: int, identity: str = "same") -> Worker:
    made = Worker.join(Group(3, index, "127.0.0.1", port), identity, threading.Event())
    assert made is not None
    return made


def test_the_leader_waits_for_every_worker_and_starts_them_together(leader: Leader, port: int, lost: Lost) -> None:
    first = join(port, 1)
    first.ready()
    waiting = threading.Thread(target=leader.wait_until_ready)
    waiting.start()
    second = join(port, 2)
    waiting.join(1.0)
    assert waiting.is_alive()
    second.ready()
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    leader.begin()
    first.wait_for_start()
    second.wait_for_start()
    leader.close()
    assert first.wait_for_end(SECONDS)
    assert "has ended" in first.end
    assert lost.failures == []


def test_a_worker_that_cannot_start_ends_the_group_with_its_own_reason(leader: Leader, port: int, lost: Lost) -> None:
    join(port, 2).failed("this pod has 4 GPUs", Reason.GPU_COUNT_MISMATCH)
    with pytest.raises(EngineStartError, match="Worker 2 of the group: this pod has 4 GPUs") as failed:
        leader.wait_until_ready()
    assert failed.value.reason is Reason.GPU_COUNT_MISMATCH
    assert lost.reported.wait(SECONDS)
    assert lost.failures == [failed.value]


def test_a_worker_whose_connection_ends_is_lost(leader: Leader, port: int, lost: Lost) -> None:
    join(port, 1)._link.close()
    assert lost.reported.wait(SECONDS)
    assert "Worker 1 of the group is lost" in str(lost.failures[0])
    assert lost.failures[0].reason is Reason.GROUP_ENDED


def test_a_worker_that_goes_silent_is_lost(monkeypatch: pytest.MonkeyPatch, port: int, lost: Lost) -> None:
    monkeypatch.setattr("lorapool_runtime.engines.vllm.group.Link.__init__.__defaults__", (0.5,))
    silent = Leader(Group(3, 0, "127.0.0.1", port), "same", lost)
    with socket.create_connection(("127.0.0.1", port + 1)) as connection:
        connection.sendall(json.dumps({"index": 1, "identity": "same"}).encode() + b"\n")
        assert lost.reported.wait(SECONDS)
    assert "it sent nothing" in str(lost.failures[0])
    silent.close()


@pytest.mark.parametrize(
    ("index", "identity", "why"), [(1, "other", "same image and settings"), (3, "same", "no place")]
)
def test_a_worker_that_does_not_fit_is_refused(
    leader: Leader, port: int, lost: Lost, index: int, identity: str, why: str
) -> None:
    place = Group(index + 1, index, "127.0.0.1", port)
    refused = Worker.join(place, identity, threading.Event())
    assert refused is not None
    assert refused.wait_for_end(SECONDS)
    assert why in refused.end
    with pytest.raises(GroupError, match=why):
        refused.wait_for_start()
    assert lost.failures == []


def test_what_is_no_message_of_a_group_is_dropped(leader: Leader, port: int, lost: Lost) -> None:
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\x00" * 20_000):
        with socket.create_connection(("127.0.0.1", port + 1)) as connection:
            connection.settimeout(SECONDS)
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1024):  # beats until it closes
                continue
    join(port, 1).ready()
    assert lost.failures == []


def test_a_worker_that_is_stopped_before_its_leader_listens_ends() -> None:
    stop = threading.Event()
    stop.set()
    assert Worker.join(Group(2, 1, "127.0.0.1", free_pair()), "same", stop) is None


# --- a worker


class Vllm:
    """Computes until it ends."""

    version = "1"
    ends = threading.Event()

    def __init__(self, config: EngineConfig) -> None:
        self.ends.clear()

    def compute(self, prepared: object) -> None:
        self.ends.wait(SECONDS)


Working = tuple[Leader, threading.Event, Future[None]]


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch, port: int, lost: Lost) -> Iterator[Working]:
    """The leader, and the worker that computes for it: its signal to stop, and its end."""
    monkeypatch.setattr(node, "Vllm", Vllm)
    monkeypatch.setattr(node, "read_base", lambda folder: None)
    monkeypatch.setattr(node, "prepare", lambda *_: None)
    config = EngineConfig("base", tensor_parallel=2, group=Group(2, 1, "127.0.0.1", port))
    leader = Leader(Group(2, 0, "127.0.0.1", port), config.identity(Vllm.version), lost)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(node.VllmNode(config).run, stop, SECONDS)
        leader.wait_until_ready()
        leader.begin()
        yield leader, stop, ended
        leader.close()
        Vllm.ends.set()


def test_a_worker_that_is_stopped_computes_until_its_leader_ends(working: Working, lost: Lost) -> None:
    leader, stop, ended = working
    stop.set()
    with pytest.raises(TimeoutError):
        ended.result(1.0)
    leader.close()
    assert ended.result(SECONDS) is None
    assert lost.failures == []


def test_a_worker_whose_leader_ends_first_fails(working: Working) -> None:
    leader, _, ended = working
    leader.close()
    with pytest.raises(GroupError, match="has ended: the group"):
        ended.result(SECONDS)


def test_a_worker_whose_part_of_vllm_ends_tells_the_leader(working: Working, lost: Lost) -> None:
    Vllm.ends.set()
    with pytest.raises(GroupError, match="vLLM's processes of worker 1"):
        working[2].result(SECONDS)
    assert lost.reported.wait(SECONDS)
    assert "vLLM's processes of worker 1 have ended" in str(lost.failures[0])


# --- settings


def test_the_variables_of_a_leader_worker_set_place_the_runtime() -> None:
    lws = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "llama-0.llama.default"}
    flags = ["--model", "base", "--engine", "vllm", "--pipeline-parallel", "2"]
    found = read_settings(flags, lws)
    assert (found.group_size, found.group_index, found.group_leader) == (2, 1, "llama-0.llama.default")
    assert found.works_for_a_leader
    assert not read_settings(flags, lws | {"LWS_WORKER_INDEX": "0"}).works_for_a_leader
    with pytest.raises(SettingsError, match="needs engine vllm"):
        read_settings(["--model", "base"], lws)
    with pytest.raises(SettingsError, match="group_leader"):
        read_settings(flags, {"LWS_GROUP_SIZE": "2"})


def test_gpus_that_cannot_be_divided_among_the_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="pipelineParallel to the number of nodes"):
        EngineConfig("base", tensor_parallel=3, group=Group(2, 0, "leader", 29501))
    config = EngineConfig("base", tensor_parallel=4, pipeline_parallel=2, group=Group(2, 0, "leader", 29501))
    assert config.local_devices == 4
    other = EngineConfig("other", tensor_parallel=4, pipeline_parallel=2, group=Group(2, 1, "leader", 29501))
    assert config.identity("1") == other.identity("1")
    assert config.identity("1") != EngineConfig("base", tensor_parallel=4, slots=9).identity("1")


# --- why vLLM did not start


@pytest.mark.parametrize(
    ("failures", "reason", "words"),
    [
        ([("OutOfMemoryError", "CUDA out of memory. Tried 2 GiB")], "DeviceMemoryTooSmall", "spec.lora.slots"),
        ([("ValueError", "The quantization method fp8 is not supported for the current GPU. Minimum capability: 89.")],
         "DeviceUnusable", "quantization"),
        ([("ValueError", "Bfloat16 is only supported on GPUs with compute capability of at least 8.0.")],
         "DeviceUnusable", "float16"),
        ([("ValueError", "World size (4) is larger than the number of available GPUs (2) in this node.")],
         "GPUCountMismatch", "tensorParallel"),
        ([("OSError", "[Errno 28] No space left on device: '/dev/shm/psm_1'")], "SharedMemoryTooSmall", "shmSizeLimit"),
        ([("RuntimeError", "Engine core initialization failed. See root cause above. Failed core proc(s): "
           "{'EngineCore': -7}")], "SharedMemoryTooSmall", "shmSizeLimit"),
        ([("ValueError", "Model architectures ['Foo'] are not supported for now.")], "BaseUnsupported", "torch"),
        ([("RuntimeError", "NCCL error: unhandled system error")], "EngineRefused", "NCCL_SOCKET_IFNAME"),
        ([("KeyError", "'what'")], "EngineRefused", "the log has the details"),
        ([], "EngineRefused", "without a reason"),
    ],
)  # fmt: skip
def test_a_failed_start_has_a_reason_and_a_remedy(failures: list[tuple[str, str]], reason: str, words: str) -> None:
    found = cause_of(failures)
    assert found.reason == reason
    assert words in str(found)


def test_the_cause_in_another_process_comes_before_what_it_led_to() -> None:
    generic = ("RuntimeError", "Engine core initialization failed. See root cause above.")
    odd = ("AttributeError", "x")
    assert "out of memory" in str(cause_of([odd, ("OutOfMemoryError", "CUDA out of memory"), generic]))
    assert "AttributeError" in str(cause_of([generic, odd]))


PARENT = """
import multiprocessing, os, time
from lorapool_runtime.engines.vllm.child import InEachProcess
def sleep(_):
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    made = multiprocessing.get_context("spawn").Process(target=sleep, args=({"in": InEachProcess("begin")},))
    made.start()
    made.join()
"""


def test_a_process_of_the_engine_does_not_outlive_a_runtime_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = int(process.stdout.readline())
        process.kill()
    until_s = time.monotonic() + SECONDS
    while _runs(started):
        assert time.monotonic() < until_s
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fail(text: child.InEachProcess) -> None:
    assert text == "begin"
    try:
        raise ValueError("the cause")
    except ValueError:
        logging.getLogger("vllm.worker").exception("it failed")


def test_what_a_process_of_the_engine_logs_as_an_exception_is_known_here() -> None:
    failures = child.Failures()
    with failures.recorded():
        process = multiprocessing.get_context("spawn").Process(target=fail, args=(child.InEachProcess("begin"),))
        process.start()
        process.join()
    assert failures.read() == [("ValueError", "the cause")]
    failures.close()
    assert child.VARIABLE not in os.environ


def test_the_text_in_the_configuration_does_nothing_in_the_runtime_itself() -> None:
    text = child.InEachProcess("begin")
    before = logging.getLogRecordFactory()
    assert text == copy.deepcopy(text) == copy.copy(text) == "begin"
    assert logging.getLogRecordFactory() is before
    assert json.dumps({"lorapool": text}) == '{"lorapool": "begin"}'
