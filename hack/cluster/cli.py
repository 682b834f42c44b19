"""The command line of `python3 hack/cluster`."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import control, kernel, lifecycle
from cluster.errors import ClusterError, NotRunningError
from cluster.places import state_dir
from cluster.programs import build, crds, install, pins


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    kernel.end_like_interrupt()
    try:
        code: int = options.run(options)
    except ClusterError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hack/cluster", description="A real one-node Kubernetes, without Docker.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if named:
            sub.add_argument("--name", default="demo", help="the cluster's name (default: demo)")
            sub.add_argument("--state", help="its folder (default: .cluster/NAME in this checkout)")
        return sub

    command("install", _install, "install what the machine lacks (Debian packages, Go)", named=False)
    command("build", _build, "compile Kubernetes and the other programs, once", named=False)
    sub = command("crd", _crd, "fetch a definition of another project, and print its path", named=False)
    sub.add_argument("definition", choices=sorted(pins.DEFINITIONS))
    sub = command("up", _up, "start the cluster, or find it started")
    sub.add_argument("--apiserver-only", action="store_true", help="etcd and the API server alone; needs no root")
    sub.add_argument("--no-controllers", action="store_true", help="with --apiserver-only: no controller manager")
    sub.add_argument("--prometheus-rules", action="append", default=[], metavar="FILE", help="a rule file to load")
    sub.add_argument("--while-pid", type=int, default=0, metavar="PID", help="end by itself when this process ends")
    sub.add_argument("--fresh", action="store_true", help="delete the cluster's earlier objects")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub = command("down", _down, "end the cluster and leave nothing running")
    sub.add_argument("--purge", action="store_true", help="also remove its folder")
    sub = command("status", _status, "show whether it is up, and the state of each component")
    sub.add_argument("--json", action="store_true")
    command("env", _env, 'print `export` lines for a shell: eval "$(python3 hack/cluster env)"')
    sub = command("forward", _forward, "reach something in the cluster at 127.0.0.1, until `down`")
    sub.add_argument("--to", required=True, metavar="HOST:PORT", help="e.g. gateway.lorapool.svc.cluster.local:80")
    sub.add_argument("--port", type=int, default=0, help="the port on 127.0.0.1 (default: any free one)")
    for verb, text in (("stop", "end one component, as a failure would"), ("start", "start it again")):
        sub = command(verb, _component, text)
        sub.add_argument("component")
        sub.set_defaults(verb=verb)
    sub = command("exec", _exec, "run a command inside the node's namespaces")
    sub.add_argument("argv", nargs=argparse.REMAINDER)
    return parser


def _state(options: argparse.Namespace) -> Path:
    return state_dir(options.name, options.state)


def _install(options: argparse.Namespace) -> int:
    install.install()
    return 0


def _build(options: argparse.Namespace) -> int:
    print(build.build())
    build.remove_old()
    return 0


def _crd(options: argparse.Namespace) -> int:
    print(crds.definition(options.definition))
    return 0


def _up(options: argparse.Namespace) -> int:
    about = lifecycle.up(
        options.name,
        _state(options),
        whole=not options.apiserver_only,
        controllers=not options.no_controllers,
        rule_files=options.prometheus_rules,
        while_pid=options.while_pid,
        fresh=options.fresh,
    )
    _show(about, options.json)
    return 0


def _show(about: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(about, indent=2))
        return
    for key, value in about.items():
        if key != "token":
            print(f"{key:20} {value}")


def _down(options: argparse.Namespace) -> int:
    lifecycle.down(_state(options), purge=options.purge)
    return 0


def _status(options: argparse.Namespace) -> int:
    state = _state(options)
    try:
        about = lifecycle.require_up(state)
    except NotRunningError as error:
        print(json.dumps({"up": False}) if options.json else str(error))
        return error.exit_code
    status = control.ask(state, {"do": "status"})
    if options.json:
        print(json.dumps(about | status, indent=2))
        return 0
    _show(about, False)
    for item in status["components"]:
        print(f"{item['name']:26} {item['state']:8} restarts {item['restarts']}")
    for port, target in status["forwards"].items():
        print(f"127.0.0.1:{port:16} -> {target}")
    return 0


def _env(options: argparse.Namespace) -> int:
    about = lifecycle.require_up(_state(options))
    print(f"export KUBECONFIG={shlex.quote(about['kubeconfig'])}")
    print(f'export PATH={shlex.quote(about["bin_dir"])}:"$PATH"')
    return 0


def _forward(options: argparse.Namespace) -> int:
    port = lifecycle.add_forward(_state(options), options.to, options.port)
    print(f"127.0.0.1:{port}")
    return 0


def _component(options: argparse.Namespace) -> int:
    state = _state(options)
    lifecycle.require_up(state)
    answer = control.ask(state, {"do": options.verb, "component": options.component})
    if "error" in answer:
        raise ClusterError(answer["error"])
    return 0


def _exec(options: argparse.Namespace) -> int:
    state = _state(options)
    lifecycle.require_up(state)
    pid = json.loads((state / "process.json").read_text())["pid"]
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    command = [install.require("nsenter"), "--target", str(pid), "--mount", "--net", "--pid", "--uts", "--", *argv]
    env = dict(os.environ, CONTAINERD_ADDRESS="/run/containerd/containerd.sock", CONTAINERD_NAMESPACE="k8s.io")
    return subprocess.run(command, env=env, check=False).returncode
