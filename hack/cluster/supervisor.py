"""Runs one cluster: process 1 of its own process, network and mount namespaces, so that its end ends everything.

Starts the components of `plan.json` in order, waits for each to be ready, reaps ended processes, restarts components
that ended, serves the forwarded ports and answers on `control.sock`. Changes nothing of the host: when this process is
killed, the kernel removes every process, mount, link and iptables rule that it made.
In the API-server mode there are no namespaces; the components then die with this process (PR_SET_PDEATHSIG).
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import control, kernel
from cluster.forward import Forward
from cluster.plan import NODE_IP, SERVICE_CIDR, Component, Plan

POLL_S = 0.05
RESTART_WAIT_S = (0.5, 1.0, 2.0, 5.0, 10.0)
SYSCTLS = {  # the kubelet insists on these values and would set them for the whole machine
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


class ComponentFailedError(Exception):
    """A component did not become ready."""

    def __init__(self, component: Component, why: str) -> None:
        super().__init__(why)
        self.component = component


@dataclass
class Running:
    """The state of one component; only the supervisor changes it."""

    component: Component
    pid: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    wanted: bool = True
    restarts: int = 0
    last_exit: int | None = None


class Supervisor:
    def __init__(self, state: Path, plan: Plan, report_fd: int) -> None:
        self._state = state
        self._running = {c.name: Running(c) for c in plan.components}
        self._by_pid: dict[int, Running] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._forwards: dict[int, Forward] = {}
        self._report_fd = report_fd
        self._started = False
        self._tasks: set[asyncio.Task[None]] = set()

    def report(self, **message: Any) -> None:
        """Writes one line to the process that started this one, if it still reads."""
        with contextlib.suppress(OSError):
            os.write(self._report_fd, json.dumps(message).encode() + b"\n")

    async def run(self, listeners: list[tuple[socket.socket, str]], while_pidfd: int | None) -> int:
        loop = self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if while_pidfd is not None:  # readable once that process has ended
            loop.add_reader(while_pidfd, stop.set)
        for listener, target in listeners:
            await self.add_forward(listener, target)
        control.serve(self._state, self._control)
        try:
            await self._start_all()
        except ComponentFailedError as failure:
            c = failure.component
            self.report(event="failed", component=c.name, why=str(failure), log=f"log/{c.name}.log", remedy=c.remedy)
            await self._end_all()
            return 1
        self._started = True
        self.report(event="up")
        os.close(self._report_fd)
        await stop.wait()
        if while_pidfd is not None:
            loop.remove_reader(while_pidfd)
        await self._end_all()
        return 0

    # --- components ---

    async def _start_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for item in self._running.values():
                    group.create_task(self._bring_up(item))
        except* ComponentFailedError as failures:
            raise failures.exceptions[0] from None

    async def _bring_up(self, item: Running) -> None:
        component = item.component
        for name in component.after:
            await self._running[name].ready.wait()
        began = time.monotonic()
        if component.task:
            await self._run_task(component)
        else:
            self._spawn(item)
            await self._wait_ready(item)
        item.ready.set()
        self.report(event="ready", component=component.name, seconds=round(time.monotonic() - began, 2))

    async def _run_task(self, component: Component) -> None:
        deadline = time.monotonic() + component.deadline_s
        while True:
            code = await self._exits_of(self._execute(component))
            if code == 0:
                return
            if time.monotonic() > deadline:
                raise ComponentFailedError(component, f"did not succeed within {component.deadline_s:.0f} s")
            await asyncio.sleep(0.2)

    async def _wait_ready(self, item: Running) -> None:
        component = item.component
        deadline = time.monotonic() + component.deadline_s
        while component.ready_url:
            if item.pid == 0:
                raise ComponentFailedError(component, f"ended with {item.last_exit} before it was ready")
            if await asyncio.to_thread(_answers, component.ready_url):
                return
            if time.monotonic() > deadline:
                raise ComponentFailedError(component, f"was not ready within {component.deadline_s:.0f} s")
            await asyncio.sleep(POLL_S)

    def _execute(self, component: Component) -> int:
        with (self._state / "log" / f"{component.name}.log").open("ab") as log:
            process = subprocess.Popen(
                component.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._state,
                start_new_session=True,
                preexec_fn=None if os.getpid() == 1 else kernel.die_with_parent,
            )  # fmt: skip
        process.returncode = 0  # `_reap` waits for it; this object must neither wait nor warn
        self._exits[process.pid] = asyncio.get_running_loop().create_future()
        return process.pid

    async def _exits_of(self, pid: int) -> int:
        try:
            return await self._exits[pid]
        finally:
            del self._exits[pid]

    def _spawn(self, item: Running) -> None:
        item.pid = self._execute(item.component)
        self._by_pid[item.pid] = item

    def _reap(self) -> None:
        """Reaps every dead child; as process 1 also the orphans of others (containerd's shims)."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if (future := self._exits.get(pid)) and not future.done():
                future.set_result(code)
            if item := self._by_pid.pop(pid, None):
                del self._exits[pid]
                item.pid, item.last_exit = 0, code
                if self._started and item.wanted:
                    self._background(self._restart(item))

    async def _restart(self, item: Running) -> None:
        wait_s = RESTART_WAIT_S[min(item.restarts, len(RESTART_WAIT_S) - 1)]
        item.restarts += 1
        print(f"{item.component.name} ended with {item.last_exit}; again in {wait_s} s", flush=True)
        await asyncio.sleep(wait_s)
        if item.wanted and item.pid == 0:
            self._spawn(item)

    def _background(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_all(self) -> None:
        """Kills all components at once. What they have written is in the page cache, so nothing is lost."""
        for item in self._running.values():
            item.wanted = False
        for item in self._running.values():
            await self._kill(item)

    async def _kill(self, item: Running) -> None:
        while item.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(item.pid, signal.SIGKILL)
            await asyncio.sleep(POLL_S)

    # --- control (requests arrive in the control thread and run on the event loop) ---

    def _control(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        sockets = [socket.socket(fileno=fd) for fd in descriptors]
        done = asyncio.run_coroutine_threadsafe(self._handle(request, sockets), self._loop)
        return done.result(timeout=15)

    async def _handle(self, request: dict[str, Any], sockets: list[socket.socket]) -> dict[str, Any]:
        match request:
            case {"do": "status"}:
                return self._status()
            case {"do": "forward", "to": str(target)} if sockets:
                await self.add_forward(sockets[0], target)
                return {"port": sockets[0].getsockname()[1]}
            case {"do": "stop", "component": str(name)} if name in self._running:
                await self._stop(self._running[name])
                return self._status()
            case {"do": "start", "component": str(name)} if name in self._running:
                await self._start(self._running[name])
                return self._status()
        return {"error": f"unknown request {request}; components: {', '.join(self._running)}"}

    async def _stop(self, item: Running) -> None:
        item.wanted = False
        await self._kill(item)

    async def _start(self, item: Running) -> None:
        item.wanted = True
        if item.pid == 0 and not item.component.task:
            self._spawn(item)

    def _status(self) -> dict[str, Any]:
        components = [
            {
                "name": item.component.name,
                "state": "running" if item.pid else "done" if item.component.task else "stopped",
                "restarts": item.restarts,
                "last_exit": item.last_exit,
            }
            for item in self._running.values()
        ]
        forwards = {str(f.port): f.target for f in self._forwards.values()}
        return {"up": self._started, "components": components, "forwards": forwards}

    async def add_forward(self, listener: socket.socket, target: str) -> None:
        forward = Forward(listener, target)
        await forward.start()
        self._forwards[forward.port] = forward


def _answers(url: str) -> bool:
    """Whether a health endpoint answers 200; certificates are not verified, they are the cluster's own."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        ).open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


# --- the namespaces ---


def enter_namespaces(state: Path) -> None:
    """Moves this process into new namespaces: mounts, links and routes made from now on are invisible outside."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_SHARED)  # pods' mounts propagate among themselves
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    for name, value in SYSCTLS.items():
        _shadow_file(state / "sysctl" / name.replace("/", "."), value + "\n", Path("/proc/sys") / name)
    resolver = Path("/etc/resolv.conf").resolve()
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    kernel.mount("tmpfs", "/var/log", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    _show(state / "pod-logs", Path("/var/log/pods"))
    _show(state / "kubelet", Path("/var/lib/kubelet"))
    _show(state / "cni", Path("/var/lib/cni"))
    if not resolver.exists():  # it was a link into /run
        resolver.parent.mkdir(parents=True, exist_ok=True)
        resolver.touch()
    kernel.mount(str(state / "conf" / "node-resolv.conf"), str(resolver), None, kernel.MS_BIND)
    _network()


def _shadow_file(source: Path, text: str, target: Path) -> None:
    if target.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
        kernel.mount(str(source), str(target), None, kernel.MS_BIND)


def _show(source: Path, target: Path) -> None:
    """Mounts a folder of the state where a program has its path compiled in."""
    source.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    kernel.mount(str(source), str(target), None, kernel.MS_BIND | kernel.MS_REC)


def _network() -> None:
    """Gives the node's address to a bridge without ports, and adds a route for Services, which kube-proxy rewrites."""
    for arguments in (
        "link set lo up",
        "link add node0 type bridge",
        f"addr add {NODE_IP}/32 dev node0",
        "link set node0 up",
        f"route add {SERVICE_CIDR} dev node0 src {NODE_IP}",
    ):
        subprocess.run(["ip", *arguments.split()], check=True, stdin=subprocess.DEVNULL)
    for name, value in (("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/route_localnet", "1")):
        Path("/proc/sys", name).write_text(value)


def _become_first_process(state: Path) -> None:
    """Forks into a new process namespace; the parent records the child's identity before the child continues."""
    kernel.unshare(kernel.CLONE_NEWPID)
    go_read, go_write = os.pipe()
    child = os.fork()
    if child:
        os.close(go_read)
        record(state, child)
        os.write(go_write, b"g")
        os._exit(0)
    os.close(go_write)
    if os.read(go_read, 1) != b"g":  # the parent died before it had recorded this process
        os._exit(1)
    os.close(go_read)


def record(state: Path, pid: int) -> None:
    """Records the identity of the process that `down` may kill."""
    identity = kernel.ProcessId.of(pid)
    temporary = state / ".process.json"
    temporary.write_text(json.dumps(identity.__dict__))
    os.replace(temporary, state / "process.json")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--listener", action="append", default=[], help="FD=TARGET")
    parser.add_argument("--while-pid", type=int, default=0)
    options = parser.parse_args(argv)
    while_pidfd = os.pidfd_open(options.while_pid) if options.while_pid else None
    if options.whole:
        _become_first_process(options.state)
        enter_namespaces(options.state)
    else:
        record(options.state, os.getpid())
    plan = Plan.from_json((options.state / "plan.json").read_text())
    listeners = []
    for item in options.listener:
        number, _, target = item.partition("=")
        listeners.append((socket.socket(fileno=int(number)), target))
    return asyncio.run(Supervisor(options.state, plan, options.report_fd).run(listeners, while_pidfd))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
