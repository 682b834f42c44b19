"""The API server of the operator tests: several run concurrently, and each ends with its test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from apiserver import running_apiserver
from local_cluster import command_lines, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "hack"))

from demo import objects  # noqa: E402  (hack is no installed package)
from demo.ground import Ground  # noqa: E402
from demo.run import Demo, Options, forget_interrupted  # noqa: E402
from demo.schedule import StepError  # noqa: E402
from demo.steps import Commands  # noqa: E402

pytestmark = pytest.mark.apiserver


def test_two_api_servers_run_side_by_side_and_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with running_apiserver(tmp_path / "a") as a, running_apiserver(tmp_path / "b") as b:
        a.kubectl("create", "namespace", "only-in-a")
        assert "only-in-a" in a.kubectl("get", "namespaces")
        assert "only-in-a" not in b.kubectl("get", "namespaces")
    assert not (tmp_path / "a" / "apiserver").exists()


def test_an_interrupted_api_server_comes_back_with_its_objects(tmp_path: Path) -> None:
    with running_apiserver(tmp_path) as server:
        server.kubectl("create", "namespace", "kept")
        server.interrupt()
        with pytest.raises(AssertionError):
            server.kubectl("get", "namespaces")
        server.resume()

        def back() -> bool:
            try:
                return "kept" in server.kubectl("get", "namespaces")
            except AssertionError:
                return False

        wait_until(back, timeout_s=60, what="the API server to answer again")


def test_the_demo_installs_again_after_its_installation_was_killed(tmp_path: Path) -> None:
    """Helm's record of the killed installation goes; that of a good one stays."""
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "never-ready"},
        "spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}},
        },
    }
    templates = tmp_path / "chart" / "templates"
    templates.mkdir(parents=True)
    (templates.parent / "Chart.yaml").write_text("{apiVersion: v2, name: chart, version: 0.1.0}")
    (templates / "deployment.yaml").write_text(json.dumps(deployment))
    (tmp_path / "server").mkdir()
    with running_apiserver(tmp_path / "server") as server:
        helm = server.bin_dir / "helm"
        ground = Ground(server.kubeconfig, None, server.bin_dir / "kubectl", helm, "", "", "", False, "", None)
        demo = Demo(Options(), Commands(tmp_path / "log"), lambda step, line: None)
        demo.ground = ground
        release = [objects.RELEASE, str(templates.parent), "-n", objects.NAMESPACE]

        def records(status: str) -> str:
            return server.kubectl("get", "secret", "-n", objects.NAMESPACE, "-l", f"status={status}", "-o", "name")

        def upgrade() -> None:
            demo.run("install", *ground.helm_argv(), "upgrade", "--install", *release, remedy="none", timeout_s=60)

        server.kubectl("create", "namespace", objects.NAMESPACE)
        first = subprocess.Popen([*ground.helm_argv(), "install", *release, "--wait"], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: bool(records("pending-install")), timeout_s=60, what="the installation to begin")
        finally:
            first.kill()
            first.wait()
        with pytest.raises(StepError, match="another operation"):
            upgrade()
        forget_interrupted(demo)
        upgrade()
        forget_interrupted(demo)
        assert records("deployed")


def test_it_ends_by_itself_when_its_test_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, os; sys.path.insert(0, sys.argv[1]); import apiserver;"
        "s = apiserver.start_apiserver(pathlib.Path(sys.argv[2])); print(s.url, flush=True); os.kill(os.getpid(), 9)"
    )
    tests = Path(__file__).resolve().parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tests), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith("https://127.0.0.1:"), done.stderr

    def gone() -> bool:
        return str(tmp_path) not in "".join(command_lines().values())

    wait_until(gone, timeout_s=20, what="etcd and the API server to end")
