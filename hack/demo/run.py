"""The demo: its steps, what each depends on, and what they do; read `_plan` to see all of it.

Every step can be repeated: a second `up` finds everything in place and is quick. Standard library only, because it also
makes the Python environment; what needs that environment runs as a command of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.places import cache_dir
from demo import objects, preflight
from demo.ground import REPOSITORY, Ground, existing, of_local
from demo.questions import Answer, BillLine, Trained, questions
from demo.report import bill_table, table, trained_block, usage_table
from demo.schedule import Step, StepError, run_all
from demo.steps import Commands, Console, write_json
from images.build import TARGETS, Image

VALUES = Path(__file__).resolve().parent / "values.yaml"
FINETUNES = REPOSITORY / "examples" / "finetunes"
PYTHON = REPOSITORY / ".venv" / "bin" / "python"
HACK = REPOSITORY / "hack"
AT_MOST = 2
"""Steps at a time: the Go compiler has the cores, and one other step waits for network and disk."""


@dataclass(frozen=True)
class Options:
    name: str = "demo"
    out: Path | None = None
    context: str | None = None
    registry: str | None = None
    purge: bool = False
    train: bool = False

    @property
    def folder(self) -> Path:
        return self.out or REPOSITORY / (".demo" if self.name == "demo" else f".demo/{self.name}")


@dataclass
class Demo:
    """One run. The fields without a value are set by the step that the comment names, for the steps after it."""

    options: Options
    commands: Commands
    show: Callable[[str, str], None]
    ground: Ground = field(init=False)  # cluster
    base_folder: Path = field(init=False)  # base
    base_uri: str = field(init=False)  # push
    adapter_uris: dict[str, str] = field(init=False)  # push
    tag: str = field(init=False)  # tag
    url: str = field(init=False)  # gateway
    key: str = field(init=False)  # objects
    answers: list[Answer] = field(init=False)  # ask
    bill: list[BillLine] = field(init=False)  # bill
    console_url: str = field(init=False)  # bill
    trained: Trained | None = None  # train, where it is asked for
    had_cluster: bool = True

    @property
    def folder(self) -> Path:
        return self.options.folder

    def run(self, step: str, *argv: str | Path, remedy: str, timeout_s: float, stdin: str | None = None) -> str:
        """Runs a command of a step and shows its progress; its standard output."""
        return self.commands.run(
            argv, remedy=remedy, timeout_s=timeout_s, stdin=stdin, show=lambda line: self.show(step, line)
        )

    def tool(self, step: str, script: str, *argv: str, timeout_s: float, stdin: str | None = None) -> str:
        """Runs a script of hack/ in the Python environment."""
        remedy = f"Run `{PYTHON} hack/{script}` alone to see more."
        return self.run(step, PYTHON, HACK / script, *argv, remedy=remedy, timeout_s=timeout_s, stdin=stdin)

    def cluster(self, step: str, *argv: str, remedy: str, timeout_s: float) -> str:
        return self.run(step, sys.executable, HACK / "cluster", *argv, remedy=remedy, timeout_s=timeout_s)

    def kubectl(self, *argv: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        return self.commands.run(
            [*self.ground.kubectl_argv(), *argv],
            remedy="The cluster may be unhealthy: `make demo-down`, then `make demo`.",
            timeout_s=timeout_s,
            stdin=stdin,
        )

    def apply(self, *manifests: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed))

    def get(self, *argv: str) -> Any:
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def until(self, step: str, check: Callable[[], str | None], *, timeout_s: float, remedy: str) -> None:
        self.commands.until(check, show=lambda text: self.show(step, text), timeout_s=timeout_s, remedy=remedy)


def up(options: Options) -> None:
    """From whatever is there to a table of answers. Raises StepError; ends what it started when interrupted."""
    options.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    demo = Demo(options, Commands(options.folder / "demo.log"), console.line)
    if options.context is None:
        demo.had_cluster = _cluster_is_up(demo)
        _preflight(running=demo.had_cluster)
    else:
        demo.ground = existing(options.context, options.registry)
    steps = plan(demo)
    console.total = len(steps)
    console.last = preflight.last_times()
    started = time.monotonic()
    try:
        run_all(steps, at_most=AT_MOST, reporter=console, stop=demo.commands.stop)
    except KeyboardInterrupt:
        _clear(demo)
        raise
    seconds = {**console.seconds, "total": round(time.monotonic() - started, 1)}
    if options.context is None:
        write_json(cache_dir() / preflight.TIMES, seconds)
    _report(demo, seconds)


def plan(demo: Demo) -> list[Step]:
    """The steps in order of preference; each starts as soon as those that it needs have ended."""
    environment = Step("environment", "make the Python environment, .venv", lambda: _environment(demo))
    base = Step("base", "make the base model, SmolLM2-135M", lambda: _base(demo), ("environment",))
    if demo.options.context is None:
        before = [
            Step("tools", "install what a node needs (containerd, runc, buildah, …)", lambda: _tools(demo)),
            environment,
            Step("programs", "compile Kubernetes, etcd, CoreDNS, Helm", lambda: _programs(demo), ("tools",)),
            Step("images", "build the two images", lambda: _images(demo), ("tools", "environment")),
            base,
            Step("unpack", "unpack the runtime image for the node", lambda: _unpack(demo), ("images",)),
            Step("cluster", "start the one-node cluster", lambda: _cluster(demo), ("programs", "unpack")),
        ]
    else:
        before = [
            environment,
            base,
            Step("images", "build the two images with docker or podman", lambda: _docker_build(demo)),
        ]
    placed = ("images",) if demo.options.context else ("images", "cluster")
    tag = Step("tag", "put the images into the registry", lambda: _tag_images(demo), placed)
    pull = Step("pull", "put the runtime image on the node", lambda: _pull(demo), ("tag",))
    train = Step("train", "train a fine-tune by the OpenAI client, and ask it", lambda: _train(demo), ("ask",))
    pulled = [pull] if demo.options.context is None else []
    return [
        *before,
        tag,
        *pulled,
        Step("install", "helm install", lambda: _helm(demo), ("tag",)),
        Step("push", "push base and fine-tunes to the registry", lambda: _push(demo), ("base", *placed)),
        Step(
            "objects",
            "kubectl apply: an API key, the base, five fine-tunes",
            lambda: _objects(demo),
            ("install", "push"),
        ),
        Step("ready", "wait until every fine-tune is Ready", lambda: _wait_ready(demo), ("objects",)),
        Step("gateway", "find the gateway's address", lambda: _gateway(demo), ("ready",)),
        Step(
            "ask",
            "ask base and fine-tunes; the first question starts the base",
            lambda: _ask(demo),
            ("gateway", *(step.name for step in pulled)),
        ),
        Step("usage", "wait for the usage in the objects' status", lambda: _wait_usage(demo), ("ask",)),
        Step("bill", "read the bill of the fine-tunes by the OpenAI client", lambda: _bill(demo), ("ask",)),
        *([train] if demo.options.train else []),
    ]


def _preflight(*, running: bool) -> None:
    machine = preflight.observe(running=running)
    print(preflight.summary(machine, preflight.last_times().get("total")), flush=True)
    if found := preflight.problems(machine):
        raise StepError("\n".join(found), step="preflight")


def _cluster_is_up(demo: Demo) -> bool:
    argv = [sys.executable, str(HACK / "cluster"), "status", "--name", demo.options.name, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def _clear(demo: Demo) -> None:
    """Ends the cluster that an interrupted run started; one that was up before stays."""
    if demo.options.context is None and not demo.had_cluster:
        print("ending the cluster …", flush=True)
        argv = [sys.executable, str(HACK / "cluster"), "down", "--name", demo.options.name]
        subprocess.run(argv, stdin=subprocess.DEVNULL, start_new_session=True, check=False)


def down(options: Options) -> None:
    """Ends the port-forward and the cluster, or removes the demo's objects from the user's cluster."""
    options.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    demo = Demo(options, Commands(options.folder / "demo.log"), console.line)
    for component in ("gateway", "ledger"):
        _end_port_forward(options.folder, component)
    if options.context is None:
        step = Step("down", "end the local cluster", lambda: _end_cluster(demo))
    else:
        demo.ground = existing(options.context, options.registry or "unused")
        step = Step("down", "helm uninstall, delete the namespace", lambda: _uninstall(demo))
    run_all([step], at_most=1, reporter=console, stop=demo.commands.stop)


def _end_cluster(demo: Demo) -> None:
    purge = ["--purge"] if demo.options.purge else []
    remedy = "Run it once more; what it names may be in use by another program."
    demo.cluster("down", "down", "--name", demo.options.name, *purge, remedy=remedy, timeout_s=180)


def _uninstall(demo: Demo) -> None:
    argv = [*demo.ground.helm_argv(), "uninstall", objects.RELEASE, "-n", objects.NAMESPACE, "--ignore-not-found"]
    demo.run("down", *argv, remedy="`helm list -A` shows what is left.", timeout_s=180)
    for namespace in (objects.NAMESPACE, objects.KEYS_NAMESPACE):
        demo.kubectl("delete", "namespace", namespace, "--ignore-not-found", timeout_s=300)


def _tools(demo: Demo) -> None:
    demo.cluster("tools", "install", remedy="The line above names the package.", timeout_s=900)


def _environment(demo: Demo) -> None:
    argv = ("make", "--no-print-directory", "-C", REPOSITORY, "install", f"PYTHON={sys.executable}")
    demo.run("environment", *argv, remedy="Run `make install` to see it alone.", timeout_s=1800)


def _programs(demo: Demo) -> None:
    demo.cluster("programs", "build", remedy="Run `make binaries` to see it alone.", timeout_s=3000)


def _cluster(demo: Demo) -> None:
    remedy = "`make demo-down` clears what was started; then try again."
    out = demo.cluster("cluster", "up", "--name", demo.options.name, "--json", remedy=remedy, timeout_s=300)
    demo.ground = of_local(json.loads(out))


def _base(demo: Demo) -> None:
    demo.base_folder = Path(_last_line(demo.tool("base", "models/base.py", timeout_s=900)))


def _images(demo: Demo) -> None:
    """Builds what changed and pushes it into the registry's storage; no cluster is up yet."""
    remedy = "Run `python3 hack/images build` to see it alone."
    demo.run("images", sys.executable, HACK / "images", "build", remedy=remedy, timeout_s=2400)


def _tag() -> str:
    """Names the content, so that a changed image is a changed pod."""
    content = "".join(Image(target, cpu_only=True).key() for target in TARGETS)
    return f"demo-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _docker() -> str:
    docker = shutil.which("docker") or shutil.which("podman")
    if docker is None:
        raise StepError("With CONTEXT= the images are built and pushed by docker or podman: put one on the PATH.")
    return docker


def _docker_names(demo: Demo) -> dict[str, str]:
    return {target: f"{demo.ground.push_registry}/lorapool-{target}:{_tag()}" for target in TARGETS}


def _docker_build(demo: Demo) -> None:
    for target, name in _docker_names(demo).items():
        argv = (_docker(), "build", "--target", target, "-t", name, REPOSITORY)
        demo.run("images", *argv, remedy="Its last lines name the step of the Dockerfile.", timeout_s=3600)


def _tag_images(demo: Demo) -> None:
    demo.tag = _tag()
    where = demo.ground.push_registry
    if demo.ground.cluster:
        argv = (sys.executable, HACK / "images", "build", "--registry", where, "--tag", demo.tag)
        demo.run("tag", *argv, remedy="Run `make image` to see it alone.", timeout_s=2400)
    else:
        for name in _docker_names(demo).values():
            demo.run("tag", _docker(), "push", name, remedy=f"Try `docker login` for {where}.", timeout_s=3600)


def _push(demo: Demo) -> None:
    demo.base_uri = _push_artifact(demo, demo.base_folder, "models/smollm2-135m-instruct")
    tasks = [question.task for question in questions(objects.NAMESPACE)]
    demo.adapter_uris = {task: _push_artifact(demo, FINETUNES / task, f"adapters/{task}") for task in tasks}


def _unpack(demo: Demo) -> None:
    """Unpacks the runtime image while the programs are compiled. A cluster that is up unpacks it when it pulls it."""
    if not demo.had_cluster:
        argv = (sys.executable, HACK / "images", "unpack", "--name", demo.options.name)
        demo.run("unpack", *argv, remedy="`make demo-down`, then again.", timeout_s=900)


def _pull(demo: Demo) -> None:
    """Gives the unpacked image its name; unpacks it where that is still to be done, while the chart is installed."""
    image = f"{demo.ground.pull_registry}/{Image('runtime', cpu_only=True).repository}:{demo.tag}"
    argv = ("exec", "--name", demo.options.name, "--", "ctr", "images", "pull", "--plain-http", image)
    demo.cluster("pull", *argv, remedy="`make demo-down`, then again.", timeout_s=600)


def _push_artifact(demo: Demo, folder: Path, repository: str) -> str:
    """Pushes a folder as an OCI artifact; its address with digest, as pods reach it."""
    insecure = ["--insecure"] if demo.ground.insecure else []
    target = f"{demo.ground.push_registry}/{repository}:1"
    digest = _last_line(demo.tool("push", "models/push.py", *insecure, str(folder), target, timeout_s=600))
    return f"oci://{demo.ground.artifact_registry}/{repository}@{digest}"


def _objects(demo: Demo) -> None:
    demo.key = _api_key(demo.folder)
    demo.apply(objects.api_key(demo.key), objects.base_model(demo.base_uri))
    demo.apply(*(objects.adapter(task, uri) for task, uri in demo.adapter_uris.items()))


def _ask(demo: Demo) -> None:
    _unload(demo)
    asked = {"url": f"{demo.url}/v1", "api_key": demo.key, "namespace": objects.NAMESPACE, "base": objects.BASE}
    out = demo.tool("ask", "demo/ask.py", timeout_s=900, stdin=json.dumps(asked))
    demo.answers = [Answer(**item) for item in json.loads(_last_line(out))]


def _bill(demo: Demo) -> None:
    """The ledger sums up what it has within some seconds."""
    models = [answer.adapter for answer in demo.answers]
    asked = {"url": f"{demo.url}/v1", "api_key": demo.key, "models": models, "requests": 2}
    out = demo.tool("bill", "demo/bill.py", timeout_s=240, stdin=json.dumps(asked))
    demo.bill = [BillLine(**line) for line in json.loads(_last_line(out))]
    address = _forward(demo, "ledger", 8000) if demo.ground.cluster else _port_forward(demo, "ledger", 8000)
    demo.console_url = f"https://{address}/console/"


def _train(demo: Demo) -> None:
    model = f"{objects.NAMESPACE}/{objects.BASE}"
    asked = {"url": f"{demo.url}/v1", "api_key": demo.key, "namespace": objects.NAMESPACE, "model": model}
    out = demo.tool("train", "demo/tune.py", timeout_s=900, stdin=json.dumps(asked))
    demo.trained = Trained(**json.loads(_last_line(out)))


def _last_line(out: str) -> str:
    lines = [line for line in out.splitlines() if line.strip()]
    if not lines:
        raise StepError("the command printed nothing; run it alone to see why")
    return lines[-1].strip()


def forget_interrupted(demo: Demo) -> None:
    """Helm refuses a release whose last installation was killed, until its record is gone."""
    interrupted = f"owner=helm,name={objects.RELEASE},status in (pending-install,pending-upgrade,pending-rollback)"
    demo.kubectl("delete", "secret", "-n", objects.NAMESPACE, "-l", interrupted)


def _helm(demo: Demo) -> None:
    demo.apply(objects.namespace())
    forget_interrupted(demo)
    argv = [*demo.ground.helm_argv(), "upgrade", "--install", objects.RELEASE, str(REPOSITORY / "charts" / "lorapool")]
    argv += ["-n", objects.NAMESPACE, "-f", str(VALUES), "--wait", "--timeout", "5m"]
    argv += ["--set-string", f"image.tag={demo.tag}"]
    argv += ["--set", f"image.registry={demo.ground.pull_registry}"]
    registry = demo.ground.artifact_registry.partition("/")[0]  # it may be at a private address
    argv += ["--set", f"artifacts.privateHosts={{{registry}}}"]
    if demo.ground.insecure:
        argv += ["--set", f"artifacts.insecureRegistries={{{demo.ground.artifact_registry}}}"]
    remedy = f"`kubectl -n {objects.NAMESPACE} get pods,events` shows what a pod waits for."
    demo.run("install", *argv, remedy=remedy, timeout_s=400)


def _api_key(folder: Path) -> str:
    """The demo's key: made once, kept in the folder for its owner only."""
    path = folder / "api_key"
    if path.exists():
        return path.read_text().strip()
    key = f"lp-{secrets.token_urlsafe(32)}"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    return key


def _condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    found = [c for c in item.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else {"status": "Unknown", "reason": "NotCheckedYet", "message": ""}


def _wait_ready(demo: Demo) -> None:
    tasks = list(demo.adapter_uris)

    def missing() -> str | None:
        items = {item["metadata"]["name"]: item for item in demo.get("lora", "-n", objects.NAMESPACE)["items"]}
        late = []
        for task in tasks:
            ready = _condition(items[task], "Ready") if task in items else {"status": "Unknown", "reason": "NotFound"}
            if ready["status"] == "False":
                raise StepError(f"{task} is not Ready: {ready['reason']}: {ready.get('message', '')}")
            if ready["status"] != "True":
                late.append(f"{task} ({ready['reason']})")
        return f"waiting for {', '.join(late)}" if late else None

    demo.until("ready", missing, timeout_s=240, remedy="The operator's log says what it waits for.")


def _unload(demo: Demo) -> None:
    """Unloads loaded fine-tunes, so that the first call of a second demo is a cold one as well."""
    items = demo.get("lora", "-n", objects.NAMESPACE)["items"]
    loaded = [i["metadata"]["name"] for i in items if _condition(i, "Loaded")["status"] == "True"]
    for suspend in ("true", "false") if loaded else ():
        for name in loaded:
            patch = f'{{"spec":{{"suspend":{suspend}}}}}'
            demo.kubectl("patch", "lora", name, "-n", objects.NAMESPACE, "--type=merge", "-p", patch)
        wanted = "False" if suspend == "true" else "True"

        def missing(wanted: str = wanted) -> str | None:
            late = [
                item["metadata"]["name"]
                for item in demo.get("lora", "-n", objects.NAMESPACE)["items"]
                if item["metadata"]["name"] in loaded
                and (_condition(item, "Ready")["status"] != wanted or _condition(item, "Loaded")["status"] != "False")
            ]
            return f"{', '.join(late)} not unloaded" if late else None

        demo.until("ask", missing, timeout_s=90, remedy="The operator's log says what it waits for.")


def _wait_usage(demo: Demo) -> None:
    """Usage is written at most once a minute, so this may take as long."""

    def missing() -> str | None:
        items = demo.get("lora", "-n", objects.NAMESPACE)["items"]
        asked = [item for item in items if item["metadata"]["name"] in demo.adapter_uris]
        late = [i["metadata"]["name"] for i in asked if not (i.get("status", {}).get("usage") or {}).get("requests")]
        return f"no usage yet of {', '.join(late)} (written at most once a minute)" if late else None

    demo.until("usage", missing, timeout_s=180, remedy="The operator's log says what it waits for.")


def _gateway(demo: Demo) -> None:
    address = _forward(demo, "gateway", 80) if demo.ground.cluster else _port_forward(demo, "gateway", 80)
    demo.url = f"http://{address}"

    def missing() -> str | None:
        try:
            urllib.request.urlopen(f"{demo.url}/v1/models", timeout=3)
        except urllib.error.HTTPError as error:
            return None if error.code == 401 else f"status {error.code}"
        except OSError as error:
            return f"{error}"
        return "an answer without a key"

    demo.until("gateway", missing, timeout_s=60, remedy="`kubectl -n lorapool logs deploy/lorapool-gateway`")


def _forward(demo: Demo, component: str, port: int) -> str:
    """The local cluster forwards a port of 127.0.0.1 to the Service, whatever pod is behind it: host:port."""
    target = f"{objects.RELEASE}-{component}.{objects.NAMESPACE}.svc.cluster.local:{port}"
    argv = ("forward", "--name", demo.options.name, "--to", target)
    return _last_line(demo.cluster(component, *argv, remedy="`make demo-down`, then again.", timeout_s=30))


def _port_forward(demo: Demo, component: str, to: int) -> str:
    _end_port_forward(demo.folder, component)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*demo.ground.kubectl_argv(), "port-forward", "-n", objects.NAMESPACE]
    argv += [f"svc/{objects.RELEASE}-{component}", f"{port}:{to}"]
    with (demo.folder / f"port-forward-{component}.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    (demo.folder / f"port-forward-{component}.pid").write_text(str(process.pid))
    return f"127.0.0.1:{port}"


def _end_port_forward(folder: Path, component: str) -> None:
    path = folder / f"port-forward-{component}.pid"
    if not path.exists():
        return
    pid = int(path.read_text())
    try:
        if b"port-forward" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    except OSError:
        pass
    path.unlink()


def _report(demo: Demo, seconds: dict[str, float]) -> None:
    ground, url, key = demo.ground, demo.url, demo.key
    print(table(demo.answers))
    if demo.trained:
        print(trained_block(demo.trained))
    print("\n" + demo.kubectl("get", "bm,lora,ftj", "-n", objects.NAMESPACE))
    print(usage_table(demo.get("lora", "-n", objects.NAMESPACE)["items"]))
    print(f"\nThe bill, by the prices of {VALUES.relative_to(REPOSITORY)}\n{bill_table(demo.bill)}")
    summary = {
        "kubeconfig": str(ground.kubeconfig),
        "kubectl": str(ground.kubectl),
        "helm": str(ground.helm),
        "namespace": objects.NAMESPACE,
        "gateway_url": url,
        "api_key": key,
        "prometheus_url": ground.prometheus_url,
        "cluster": ground.cluster,
        "audit_log": str(ground.audit_log) if ground.audit_log else None,
        "registry": ground.push_registry,
        "artifact_registry": ground.artifact_registry,
        "seconds": seconds,
        "answers": [asdict(answer) for answer in demo.answers],
        "bill": [asdict(line) for line in demo.bill],
        "console_url": demo.console_url,
        "trained": asdict(demo.trained) if demo.trained else None,
    }
    write_json(demo.folder / "summary.json", summary, mode=0o600)  # it holds the key
    shown = demo.folder.relative_to(REPOSITORY) if demo.folder.is_relative_to(REPOSITORY) else demo.folder
    print(
        f"""
Gateway     {url}/v1   (OpenAI API)
Key         {key}
Console     {demo.console_url}   (log in with the key; the browser does not know the release's own authority)
Prometheus  {ground.prometheus_url or "(yours)"}
kubectl     export KUBECONFIG={ground.kubeconfig} PATH={ground.kubectl.parent}:$PATH

Try next
  curl {url}/v1/models -H "Authorization: Bearer {key}"
  kubectl -n {objects.NAMESPACE} get lora -w          # an idle fine-tune is unloaded after two minutes, the base later
  kubectl -n {objects.NAMESPACE} describe lora routing
  make demo TRAIN=1                         # trains one more fine-tune by the OpenAI client, in about two minutes
  make demo-down                            # ends all of it
Everything above is also in {shown}/summary.json. It took {preflight.duration(seconds["total"])}."""
    )
