"""How the programs are made and published, and which pods Prometheus is given; nothing is compiled here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "hack"))

from cluster import targets  # noqa: E402  (hack is no installed package)
from cluster.errors import BuildFailedError, MissingToolError  # noqa: E402
from cluster.programs import build, crds, debian, install, pins  # noqa: E402

GO = """#!/bin/sh
case "$1" in
env) echo go1.25.0; exit;;
esac
while [ "$1" != -o ]; do shift; done
for name in control node etcd coredns pause helm; do echo "$0" > "$2$name"; done
echo "package/compiled" >&2
{after}
"""


def fake_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, after: str = "") -> Path:
    """A cache of its own, and a PATH with a Go and a Prometheus that only pretend."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("go", GO.format(after=after)), ("prometheus", "#!/bin/sh\n"), ("promtool", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("LORAPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(install, "SEARCH_PATH", f"{tools}:/usr/bin:/bin")
    return tmp_path / "cache" / "bin"


def test_the_programs_appear_together_under_all_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bins = fake_machine(tmp_path, monkeypatch)
    folder = build.build()
    names = {path.name for path in folder.iterdir()}
    assert {"kube-apiserver", "kubectl", "kubelet", "kube-proxy", "etcd", "helm", "coredns", "pause"} < names
    assert {"prometheus", "promtool"} < names
    assert (folder / "kubelet").read_text() == (folder / "node").read_text()
    assert {path.name for path in bins.iterdir()} == {folder.name, ".lock", "build.log"}


def test_a_failed_build_publishes_nothing_and_shows_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bins = fake_machine(tmp_path, monkeypatch, after="echo no space left >&2; exit 2")
    with pytest.raises(BuildFailedError, match="ended with 2") as raised:
        build.build()
    assert "no space left" in raised.value.report()
    assert {path.name for path in bins.iterdir()} == {".lock", "build.log"}


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from cluster.programs import build, install
install.SEARCH_PATH = sys.argv[2]
build.HEARTBEAT_S = 0.01
build.build()
"""


def test_an_interrupted_build_leaves_no_process_and_no_half_made_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    bins = fake_machine(tmp_path, monkeypatch, after=f"echo $$ > {fifo}; exec sleep 60")
    argv = [sys.executable, "-c", BUILD, str(REPOSITORY / "hack"), install.SEARCH_PATH]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    compiler = int(fifo.read_text())
    assert process.stderr is not None
    while "packages compiled" not in process.stderr.readline():
        pass
    os.kill(process.pid, signal.SIGINT)
    process.stderr.read()
    process.stderr.close()
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(compiler, 0)
    assert {path.name for path in bins.iterdir()} == {".lock", "build.log"}


def test_a_leftover_of_a_killed_build_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bins = fake_machine(tmp_path, monkeypatch)
    (bins / ".building-killed" / "bin").mkdir(parents=True)
    build.build()
    assert not (bins / ".building-killed").exists()


def test_a_program_that_the_machine_has_is_linked_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(tmp_path, monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    debian.take_programs(pins.FROM_DEBIAN, target)
    assert (target / "promtool").readlink() == tmp_path / "tools" / "promtool"


def test_without_the_program_and_without_apt_the_remedy_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "SEARCH_PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match="neither prometheus nor apt-get") as raised:
        debian.take_programs(pins.FROM_DEBIAN, tmp_path)
    assert "install prometheus by hand" in raised.value.report()


def pod(name: str, *, phase: str = "Running", ip: str = "10.244.0.5", **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "labels": {"app.kubernetes.io/component": "gateway"},
            "annotations": {f"prometheus.io/{key}": value for key, value in annotations.items()},
        },
        "spec": {"nodeName": "node1"},
        "status": {"phase": phase, "podIP": ip},
    }


def test_a_running_pod_that_asks_for_it_is_scraped_with_a_pod_monitors_labels() -> None:
    asks = pod("a", scrape="true", port="8080", path="/m")
    assert targets.targets([asks]) == [
        {
            "targets": ["10.244.0.5:8080"],
            "labels": {
                "namespace": "ns",
                "pod": "a",
                "node": "node1",
                "job": "ns/gateway",
                "__metrics_path__": "/m",
            },
        }
    ]


@pytest.mark.parametrize(
    "silent",
    [
        pod("a"),
        pod("a", scrape="false", port="8080"),
        pod("a", scrape="true"),
        pod("a", scrape="true", port="http"),
        pod("a", scrape="true", port="8080", phase="Succeeded"),
        pod("a", scrape="true", port="8080", ip=""),
    ],
)
def test_other_pods_are_not_scraped(silent: dict[str, Any]) -> None:
    assert targets.targets([silent]) == []


def test_the_targets_file_is_replaced_only_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    targets.write(file, targets.targets([pod("a", scrape="true", port="1")]))
    first = file.stat()
    targets.write(file, targets.targets([pod("a", scrape="true", port="1")]))
    assert file.stat() == first
    targets.write(file, [])
    assert json.loads(file.read_text()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["targets.json"]


def test_a_definition_of_another_project_is_fetched_once_and_its_sum_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(tmp_path, monkeypatch)
    pinned = pins.DEFINITIONS["leaderworkersets"]
    module = tmp_path / "module"
    (module / pinned.path).parent.mkdir(parents=True)
    (module / pinned.path).write_text("kind: CustomResourceDefinition")
    answer = json.dumps({"Dir": str(module), "Sum": pinned.sum})
    go = tmp_path / "tools" / "go"
    go.write_text(f"#!/bin/sh\n[ $1 = env ] && echo go1.25.0 && exit\necho $@ >> {tmp_path}/asked; echo '{answer}'\n")
    made = crds.definition("leaderworkersets")
    assert crds.definition("leaderworkersets") == made
    assert made.read_text() == "kind: CustomResourceDefinition"
    assert (tmp_path / "asked").read_text() == f"mod download -json {pinned.module}@{pinned.version}\n"

    made.unlink()
    go.write_text(go.read_text().replace(pinned.sum, "h1:other"))
    with pytest.raises(BuildFailedError, match="has the sum h1:other, not the pinned"):
        crds.definition("leaderworkersets")
    go.write_text("#!/bin/sh\n[ $1 = env ] && echo go1.25.0 && exit\necho no network >&2; exit 1\n")
    with pytest.raises(BuildFailedError, match=r"could not fetch .*: no network"):
        crds.definition("leaderworkersets")
    assert not made.exists()
