"""`up` and `down`: the steps of the demo in order; read it top to bottom to see what the demo does.

Every step can be repeated: a second `up` finds everything in place and is quick.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from demo import objects
from demo.ask import Answer, ask_all, questions
from demo.ground import REPOSITORY, Ground, check_machine, existing, local
from demo.report import table, usage_table, write_summary
from demo.steps import StepError, Steps, until
from images.build import TARGETS, Image

VALUES = Path(__file__).resolve().parent / "values.yaml"
FINETUNES = REPOSITORY / "examples" / "finetunes"


@dataclass(frozen=True)
class Options:
    name: str = "demo"
    out: Path | None = None
    context: str | None = None
    registry: str | None = None
    purge: bool = False

    @property
    def folder(self) -> Path:
        return self.out or REPOSITORY / (".demo" if self.name == "demo" else f".demo/{self.name}")


@dataclass(frozen=True)
class Demo:
    """What every step after the ground needs."""

    steps: Steps
    ground: Ground
    folder: Path

    def kubectl(self, *argv: str, stdin: str | None = None, timeout_s: float = 120) -> str:
        return self.steps.command(
            [*self.ground.kubectl_argv(), *argv],
            remedy="The cluster may be unwell: `make demo-down`, then `make demo`.",
            timeout_s=timeout_s,
            stdin=stdin,
            show=False,
        )

    def apply(self, *manifests: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed))

    def get(self, *argv: str) -> Any:
        return json.loads(self.kubectl("get", *argv, "-o", "json"))


def up(options: Options) -> None:
    """From whatever is there to a table of answers. Raises StepError."""
    options.folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(total=12 if options.context is None else 9, log=options.folder / "demo.log")
    started = time.monotonic()
    if options.context is None:
        check_machine()
        ground = local(steps, options.name)
    else:
        ground = existing(options.context, options.registry)
    demo = Demo(steps, ground, options.folder)

    with steps.step("Make the base model, SmolLM2-135M-Instruct"):
        base_folder = _last_line(_tool(steps, "models/base.py", timeout_s=900))
    with steps.step("Build the two images (first time: a few minutes, torch is 6 GB)"):
        tag = _build_images(demo)
    with steps.step("Push base and fine-tunes to the registry as OCI artifacts"):
        base_uri, adapter_uris = _push_artifacts(demo, base_folder)
    with steps.step("helm install"):
        _helm(demo, tag)
    with steps.step("kubectl apply: an API key, the base, five fine-tunes"):
        key = _api_key(demo.folder)
        demo.apply(objects.api_key(key), objects.base_model(base_uri))
        demo.apply(*(objects.adapter(task, uri) for task, uri in adapter_uris.items()))
    with steps.step("Wait until every fine-tune is judged Ready"):
        _wait_ready(demo, list(adapter_uris))
    with steps.step("Find the way to the gateway"):
        url = _gateway_url(demo)
    with steps.step("Ask base and fine-tunes (the first question also starts the base)"):
        _park(demo)
        client = OpenAI(base_url=f"{url}/v1", api_key=key, timeout=400, max_retries=0)
        answers = ask_all(client, f"{objects.NAMESPACE}/{objects.BASE}", questions(objects.NAMESPACE))
    with steps.step("Wait for the usage in the objects' status"):
        _wait_usage(demo)
    _report(demo, answers, url, key, started)


def down(options: Options) -> None:
    """Ends the port-forward and the cluster, or takes the demo's objects out of the user's cluster."""
    options.folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(total=1, log=options.folder / "demo.log")
    _end_port_forward(options.folder)
    if options.context is not None:
        demo = Demo(steps, existing(options.context, options.registry or "unused"), options.folder)
        with steps.step("helm uninstall, delete the namespace"):
            steps.command(
                [*demo.ground.helm_argv(), "uninstall", objects.RELEASE, "-n", objects.NAMESPACE, "--ignore-not-found"],
                remedy="`helm list -A` shows what is left.",
                timeout_s=180,
            )
            demo.kubectl("delete", "namespace", objects.NAMESPACE, "--ignore-not-found", timeout_s=300)
        return
    with steps.step("End the local cluster"):
        argv = [sys.executable, str(REPOSITORY / "hack" / "cluster"), "down", "--name", options.name]
        steps.command(
            [*argv, *(["--purge"] if options.purge else [])],
            remedy="Run it once more; what it names may be held by another program.",
            timeout_s=180,
        )


def _tool(steps: Steps, script: str, *argv: str, timeout_s: float) -> str:
    return steps.command(
        [sys.executable, str(REPOSITORY / "hack" / script), *argv],
        remedy=f"Run `{sys.executable} hack/{script}` alone to see more.",
        timeout_s=timeout_s,
    )


def _last_line(out: str) -> str:
    lines = [line for line in out.splitlines() if line.strip()]
    if not lines:
        raise StepError("the command printed nothing; run it alone to see why")
    return lines[-1].strip()


def _build_images(demo: Demo) -> str:
    """Builds what changed and pushes it; the tag names the content, so that a changed image is a changed pod."""
    content = "".join(Image(target, cpu_only=True).key() for target in TARGETS)
    tag = f"demo-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    where = demo.ground.push_registry
    if demo.ground.cluster:
        _tool(demo.steps, "images", "build", "--registry", where, "--tag", tag, timeout_s=2400)
        return tag
    docker = shutil.which("docker") or shutil.which("podman")
    if docker is None:
        raise StepError("With CONTEXT= the images are built and pushed by docker or podman: put one on the PATH.")
    for target in TARGETS:
        name = f"{where}/lorapool-{target}:{tag}"
        for argv in ([docker, "build", "--target", target, "-t", name, str(REPOSITORY)], [docker, "push", name]):
            demo.steps.command(argv, remedy=f"Try `{docker} login` for {where}.", timeout_s=3600)
    return tag


def _push_artifacts(demo: Demo, base_folder: str) -> tuple[str, dict[str, str]]:
    insecure = ["--insecure"] if demo.ground.insecure else []

    def push(folder: Path, repository: str) -> str:
        target = f"{demo.ground.push_registry}/{repository}:1"
        out = _tool(demo.steps, "models/push.py", *insecure, str(folder), target, timeout_s=600)
        digest = _last_line(out)
        return f"oci://{demo.ground.artifact_registry}/{repository}@{digest}"

    base = push(Path(base_folder), "models/smollm2-135m-instruct")
    tasks = [question.task for question in questions(objects.NAMESPACE)]
    return base, {task: push(FINETUNES / task, f"adapters/{task}") for task in tasks}


def _helm(demo: Demo, tag: str) -> None:
    demo.apply(objects.namespace())
    argv = [*demo.ground.helm_argv(), "upgrade", "--install", objects.RELEASE, str(REPOSITORY / "charts" / "lorapool")]
    argv += ["-n", objects.NAMESPACE, "-f", str(VALUES), "--wait", "--timeout", "5m"]
    argv += ["--set-string", f"image.tag={tag}"]
    argv += ["--set", f"image.registry={demo.ground.pull_registry}"]
    if demo.ground.insecure:
        argv += ["--set", f"artifacts.insecureRegistries={{{demo.ground.artifact_registry}}}"]
    remedy = f"`kubectl -n {objects.NAMESPACE} get pods,events` shows what a pod waits for."
    demo.steps.command(argv, remedy=remedy, timeout_s=400)


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
    return found[0] if found else {"status": "Unknown", "reason": "NotJudgedYet", "message": ""}


def _wait_ready(demo: Demo, tasks: list[str]) -> None:
    def missing() -> str | None:
        items = {item["metadata"]["name"]: item for item in demo.get("lora", "-n", objects.NAMESPACE)["items"]}
        late = []
        for task in tasks:
            ready = _condition(items[task], "Ready") if task in items else {"status": "Unknown", "reason": "NotThere"}
            if ready["status"] == "False":
                raise StepError(f"{task} is not Ready: {ready['reason']}: {ready.get('message', '')}")
            if ready["status"] != "True":
                late.append(f"{task} ({ready['reason']})")
        return f"waiting for {', '.join(late)}" if late else None

    until("fine-tunes", missing, timeout_s=240, remedy="The operator's log says what it waits for.")


def _park(demo: Demo) -> None:
    """Takes loaded fine-tunes off the device, so that the first call of a second demo is a cold one as well."""
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
            return f"{', '.join(late)} not parked" if late else None

        until("parking", missing, timeout_s=90, remedy="The operator's log says what it waits for.", every_s=1)


def _wait_usage(demo: Demo) -> None:
    """Usage is written at most once a minute, so this may take as long."""

    def missing() -> str | None:
        items = demo.get("lora", "-n", objects.NAMESPACE)["items"]
        late = [i["metadata"]["name"] for i in items if not (i.get("status", {}).get("usage") or {}).get("requests")]
        return f"no usage yet of {', '.join(late)} (written at most once a minute)" if late else None

    until("usage", missing, timeout_s=180, remedy="The operator's log says what it waits for.")


def _gateway_url(demo: Demo) -> str:
    url = _forward(demo) if demo.ground.cluster else _port_forward(demo)

    def missing() -> str | None:
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=3)
        except urllib.error.HTTPError as error:
            return None if error.code == 401 else f"status {error.code}"
        except OSError as error:
            return f"{error}"
        return "an answer without a key"

    until(f"gateway at {url}", missing, timeout_s=60, remedy="`kubectl -n lorapool logs deploy/lorapool-gateway`")
    return url


def _forward(demo: Demo) -> str:
    """The local cluster keeps a way from 127.0.0.1 to the Service, whatever pod is behind it."""
    assert demo.ground.cluster is not None
    target = f"{objects.RELEASE}-gateway.{objects.NAMESPACE}.svc.cluster.local:80"
    out = _tool(demo.steps, "cluster", "forward", "--name", demo.ground.cluster, "--to", target, timeout_s=30)
    return f"http://{_last_line(out)}"


def _port_forward(demo: Demo) -> str:
    _end_port_forward(demo.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*demo.ground.kubectl_argv(), "port-forward", "-n", objects.NAMESPACE, "svc/lorapool-gateway", f"{port}:80"]
    with (demo.folder / "port-forward.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    (demo.folder / "port-forward.pid").write_text(str(process.pid))
    return f"http://127.0.0.1:{port}"


def _end_port_forward(folder: Path) -> None:
    path = folder / "port-forward.pid"
    if not path.exists():
        return
    pid = int(path.read_text())
    try:
        if b"port-forward" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    except OSError:
        pass
    path.unlink()


def _report(demo: Demo, answers: list[Answer], url: str, key: str, started: float) -> None:
    ground = demo.ground
    print(table(answers))
    print("\n" + demo.kubectl("get", "bm,lora", "-n", objects.NAMESPACE))
    print(usage_table(demo.get("lora", "-n", objects.NAMESPACE)["items"]))
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
        "seconds": {**demo.steps.seconds, "total": round(time.monotonic() - started, 1)},
        "answers": [answer.as_json() for answer in answers],
    }
    write_summary(demo.folder / "summary.json", summary)
    shown = demo.folder.relative_to(REPOSITORY) if demo.folder.is_relative_to(REPOSITORY) else demo.folder
    print(
        f"""
Gateway     {url}/v1   (OpenAI API)
Key         {key}
Prometheus  {ground.prometheus_url or "(yours)"}
kubectl     export KUBECONFIG={ground.kubeconfig} PATH={ground.kubectl.parent}:$PATH

Try next
  curl {url}/v1/models -H "Authorization: Bearer {key}"
  kubectl -n {objects.NAMESPACE} get lora -w          # an idle fine-tune parks after two minutes, the base later
  kubectl -n {objects.NAMESPACE} describe lora routing
  make demo-down                            # ends all of it
Everything above is also in {shown}/summary.json. It took {time.monotonic() - started:.0f} s."""
    )
