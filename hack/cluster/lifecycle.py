"""Starts, ends and describes a cluster: everything between the command line and the supervisor.

`up` first removes what a killed run left, then writes a plan and starts the supervisor; `down` ends it. Both hold the
lock of the state folder, and both kill only the process that the folder records, identified by its start time.
"""

import fcntl
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import cgroups, control, forward, oci, pki, trees
from cluster import plan as planning
from cluster.errors import ClusterError, MissingToolError, NotRunningError, StartFailedError
from cluster.kernel import ProcessId
from cluster.places import HACK, NAME, cache_dir, tail
from cluster.programs import build, install
from cluster.say import say

START_DEADLINE_S = 150.0
END_DEADLINE_S = 30.0
PORT_RANGE = (20000, 32000)  # below the kernel's range for outgoing connections
TOOLS = ("containerd", "ctr", "docker-registry")
NEEDED_ON_PATH = ("runc", "iptables", "ip", "conntrack", "mount")
FORBIDDEN_STATE = ("/run", "/var/run", "/var/log", "/proc", "/sys", "/dev")


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One `up` or `down` of a folder at a time."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another up or down of this cluster is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(
    name: str,
    state: Path,
    *,
    whole: bool = True,
    controllers: bool = True,
    rule_files: Sequence[str] = (),
    while_pid: int = 0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Starts the cluster unless it is up, and returns how to reach it. Raises ClusterError."""
    if not NAME.fullmatch(name):
        raise ClusterError(f"a cluster's name is a short DNS label, not {name!r}")
    programs = _check_machine(state, whole)
    with _locked(state):
        if not fresh and is_up(state) and _read_spec(state)["whole"] == whole:
            say(f"{name} is already up")
            return describe(state)
        if (state / "process.json").exists():
            say("removing what an earlier run left")
        _end(state)
        if fresh:
            _remove_contents(state)
        began = time.monotonic()
        for attempt in range(3):
            spec = _spec(name, state, programs, whole, controllers, rule_files)
            try:
                _start(spec, while_pid)
                break
            except StartFailedError as error:
                _end(state)
                if attempt == 2 or "address already in use" not in error.log_tail:
                    raise
                say("a port was taken in the meantime; trying others")
                (state / "spec.json").unlink()
            except BaseException:  # interrupted: a cluster that is half up serves no purpose
                _end(state)
                raise
        say(f"{name} is up after {time.monotonic() - began:.1f} s")
        return describe(state)


def down(state: Path, *, purge: bool = False) -> None:
    """Ends the cluster; `purge` also removes its folder (the images in the shared registry stay)."""
    if not state.exists():
        return
    with _locked(state):
        _end(state)
        if purge:
            _remove_contents(state)
    if purge:
        (state / ".lock").unlink(missing_ok=True)
        try:
            state.rmdir()
        except OSError as error:
            raise ClusterError(f"cannot remove {state}: {error}") from None


def is_up(state: Path) -> bool:
    """Whether the supervisor lives and has started everything."""
    process = _process(state)
    if process is None or not process.alive():
        return False
    try:
        return bool(control.ask(state, {"do": "status"}).get("up"))
    except NotRunningError:
        return False


def describe(state: Path) -> dict[str, Any]:
    """How to reach the cluster, for people and programs."""
    spec = _read_spec(state)
    ports = spec["ports"]
    out: dict[str, Any] = {
        "name": spec["name"],
        "kubeconfig": str(state / "admin.kubeconfig"),
        "api_url": f"https://127.0.0.1:{ports['api']}",
        "ca_file": str(state / "pki" / "ca.crt"),
        "token": spec["token"],
        "bin_dir": spec["programs"],
        "state_dir": str(state),
        "audit_log": str(state / "log" / "audit.log"),
    }
    if spec["whole"]:
        out |= {
            "registry": f"127.0.0.1:{ports['registry']}",
            "registry_in_cluster": planning.REGISTRY_IN_CLUSTER,
            "prometheus_url": f"http://127.0.0.1:{ports['prometheus']}",
            "rules_dir": str(state / "rules"),
            "node_ip": planning.NODE_IP,
        }
    return out


def require_up(state: Path) -> dict[str, Any]:
    """`describe`, or NotRunningError."""
    if not is_up(state):
        raise NotRunningError(f"no cluster is up in {state}", remedy="`python3 hack/cluster up`")
    return describe(state)


def add_forward(state: Path, target: str, port: int = 0) -> int:
    """Makes `target` (host:port, as the cluster resolves it) reachable at 127.0.0.1:<returned port> until `down`."""
    require_up(state)
    listed: dict[str, str] = control.ask(state, {"do": "status"})["forwards"]
    for known, where in listed.items():
        if where == target and port in (0, int(known)):
            return int(known)
    try:
        listener = forward.listen(port or _free_port())
    except OSError as error:
        raise ClusterError(f"127.0.0.1:{port}: {error.strerror}", remedy="choose another --port") from None
    with listener:
        answer = control.ask(state, {"do": "forward", "to": target}, listener)
    if "error" in answer:
        raise ClusterError(answer["error"])
    return int(answer["port"])


# --- starting ---


def _check_machine(state: Path, whole: bool) -> Path:
    """Everything that can be known to be missing before anything is started; builds what is not built."""
    programs = build.build()
    install.require("openssl")
    if whole:
        if os.geteuid() != 0:
            raise MissingToolError(
                "a whole cluster has a kubelet and containers, which need root",
                remedy="run it as root; `up --apiserver-only` works as any user",
            )
        for command in (*TOOLS, *NEEDED_ON_PATH):
            install.require(command)
        install.cni_folder()
        if any(state.is_relative_to(folder) for folder in FORBIDDEN_STATE):
            raise ClusterError(f"the state folder may not be below {', '.join(FORBIDDEN_STATE)}: {state}")
    return programs


def _spec(
    name: str, state: Path, programs: Path, whole: bool, controllers: bool, rule_files: Sequence[str]
) -> planning.Spec:
    """Keeps the folder's earlier ports and token if the ports are still free; else chooses new ones."""
    earlier = _read_spec(state) if (state / "spec.json").exists() else {}
    storage = cache_dir() / "registry"
    ports = planning.Ports(**earlier["ports"]) if earlier.get("whole") == whole else None
    if ports is None or not all(_is_free(p) for p in _host_ports(ports, whole)):
        a, b, c, d = (_free_port() for _ in range(4))
        registry = registry_port(storage)
        ports = planning.Ports(a, registry, c) if whole else planning.Ports(a, etcd=b, etcd_peer=c, controllers=d)
    if whole:
        storage.mkdir(parents=True, exist_ok=True)
    spec = planning.Spec(
        name=name,
        whole=whole,
        state=state,
        programs=programs,
        ports=ports,
        token=earlier.get("token") or secrets.token_hex(24),
        controllers=controllers,
        registry_storage=storage,
        tools={tool: install.require(tool) for tool in TOOLS} | {"python3": sys.executable} if whole else {},
        cni_folder=install.cni_folder() if whole else "",
        cgroup_root=cgroups.root(state),
        rule_files=tuple(str(Path(f).resolve()) for f in rule_files),
    )
    (state / "spec.json").write_text(json.dumps(asdict(spec), default=str))
    (state / "spec.json").chmod(0o600)
    return spec


def _read_spec(state: Path) -> dict[str, Any]:
    try:
        spec: dict[str, Any] = json.loads((state / "spec.json").read_text())
    except FileNotFoundError:
        raise NotRunningError(f"there is no cluster in {state}", remedy="`python3 hack/cluster up`") from None
    return spec


def _host_ports(ports: planning.Ports, whole: bool) -> tuple[int, ...]:
    return (
        (ports.api, ports.registry, ports.prometheus)
        if whole
        else (ports.api, ports.etcd, ports.etcd_peer, ports.controllers)
    )


def _is_free(port: int) -> bool:
    try:
        forward.listen(port).close()
    except OSError:
        return False
    return True


def registry_port(storage: Path) -> int:
    """Derived from the storage, so that it stays the same: a builder remembers by address what it has pushed."""
    low, high = PORT_RANGE
    port = low + int.from_bytes(hashlib.sha256(str(storage).encode()).digest()[:4]) % (high - low)
    return port if _is_free(port) else _free_port()


def _free_port() -> int:
    for _ in range(200):
        port = random.randint(*PORT_RANGE)
        if _is_free(port):
            return port
    raise ClusterError("found no free port on 127.0.0.1")


def _start(spec: planning.Spec, while_pid: int) -> None:
    state = spec.state
    plan = planning.plan(spec)
    for folder in ("log", "rules", "conf/net.d"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    for old in (state / "log").glob("*.log"):
        old.unlink()  # a tail shown after a failure must be of this start
    addresses = ("127.0.0.1", planning.NODE_IP, planning.API_SERVICE_IP, "localhost", *_API_NAMES)
    pki.ensure(state / "pki", addresses)
    for path, text in plan.files.items():
        target = state / path
        target.write_text(text)
        target.chmod(0o600)
    (state / "plan.json").write_text(plan.to_json())
    if spec.whole:
        oci.write_archive(spec.programs / "pause", planning.SANDBOX_IMAGE, state / "conf" / "pause.tar")
        cgroups.make(spec.cgroup_root)
    _launch(spec, plan, while_pid)


_API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)


def _launch(spec: planning.Spec, plan: planning.Plan, while_pid: int) -> None:
    """Starts the supervisor and waits until it reports that all is ready. Raises StartFailedError."""
    read, write = os.pipe()
    try:
        listeners = [(forward.listen(int(port)), target) for port, target in plan.forwards.items()]
    except OSError as error:
        os.close(read)
        os.close(write)
        raise StartFailedError("a port on 127.0.0.1 is taken", log_tail=str(error).lower()) from None
    command = [sys.executable, "-m", "cluster.supervisor", str(spec.state), "--report-fd", str(write)]
    if spec.whole:
        command.append("--whole")
    if while_pid:
        command += ["--while-pid", str(while_pid)]
    for listener, target in listeners:
        command += ["--listener", f"{listener.fileno()}={target}"]
    env = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR")}
    env |= {"PATH": install.SEARCH_PATH, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    log = spec.state / "log" / "supervisor.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=HACK, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            pass_fds=[write, *(s.fileno() for s, _ in listeners)], start_new_session=True,
        )  # fmt: skip
    os.close(write)
    for listener, _ in listeners:
        listener.close()
    if spec.whole:
        child.wait(timeout=30)  # it forks into its namespace and leaves
    else:
        child.returncode = 0  # it stays, and outlives this command
    with os.fdopen(read, "rb", buffering=0) as reports:
        _follow(reports.fileno(), spec, plan)


def _follow(reports: int, spec: planning.Spec, plan: planning.Plan) -> None:
    waiting = {c.name for c in plan.components}
    deadline = time.monotonic() + START_DEADLINE_S
    pending = b""
    os.set_blocking(reports, False)
    last_said = time.monotonic()
    while True:
        try:
            chunk = os.read(reports, 65536)
        except BlockingIOError:
            time.sleep(0.02)
            now = time.monotonic()
            if now > deadline:
                why = f"waited {START_DEADLINE_S:.0f} s for {', '.join(sorted(waiting))}"
                raise _failed(spec, "supervisor", why) from None
            if now - last_said > 10:
                say(f"… waiting for {', '.join(sorted(waiting))}")
                last_said = now
            continue
        if not chunk:
            raise _failed(spec, "supervisor", "ended before the cluster was up")
        *lines, pending = (pending + chunk).split(b"\n")
        for message in map(json.loads, lines):
            match message:
                case {"event": "ready", "component": str(name), "seconds": seconds}:
                    waiting.discard(name)
                    say(f"{name} ready ({seconds} s)")
                    last_said = time.monotonic()
                case {"event": "failed", "component": str(name), "why": str(why), "remedy": str(remedy)}:
                    raise _failed(spec, name, why, remedy)
                case {"event": "up"}:
                    return


def _failed(spec: planning.Spec, component: str, why: str, remedy: str = "") -> StartFailedError:
    log = spec.state / "log" / f"{component}.log"
    return StartFailedError(
        f"{component} {why}",
        log_tail=tail(log),
        remedy=remedy or f"read {log}; `python3 hack/cluster up --fresh` starts from nothing",
    )


# --- ending ---


def _process(state: Path) -> ProcessId | None:
    try:
        return ProcessId(**json.loads((state / "process.json").read_text()))
    except FileNotFoundError:
        return None


def _end(state: Path) -> None:
    """Kills the supervisor and with it everything in its namespaces, then removes what outlives processes."""
    process = _process(state)
    if process is not None:
        whole = bool(_read_spec(state)["whole"])
        process.kill(signal.SIGKILL if whole else signal.SIGTERM)
        deadline = time.monotonic() + END_DEADLINE_S
        while process.alive():
            if time.monotonic() > deadline - END_DEADLINE_S / 2:
                process.kill(signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ClusterError(f"process {process.pid} does not end", remedy=f"look at /proc/{process.pid}/stack")
            time.sleep(0.02)
    cgroups.remove(cgroups.root(state))
    (state / "process.json").unlink(missing_ok=True)
    (state / control.SOCKET).unlink(missing_ok=True)


def _remove_contents(state: Path) -> None:
    for entry in state.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            trees.remove(entry)
        else:
            entry.unlink()
