"""The API server of the operator tests: several run concurrently, and each ends with its test."""

import subprocess
import sys
from pathlib import Path

import pytest
from apiserver import running_apiserver
from local_cluster import command_lines, wait_until

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
