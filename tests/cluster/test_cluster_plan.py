"""The pure decisions of hack/cluster and hack/images."""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "hack"))

from cluster import oci, plan, trees  # noqa: E402  (hack is no installed package)
from cluster.errors import ClusterError  # noqa: E402
from cluster.kernel import ProcessId  # noqa: E402
from cluster.programs import pins  # noqa: E402
from images.base import debian_mirror  # noqa: E402

TOOLS = {tool: f"/usr/bin/{tool}" for tool in ("containerd", "ctr", "docker-registry", "python3")}


def spec(*, whole: bool, state: str = "/s/demo") -> plan.Spec:
    return plan.Spec(
        name="demo",
        whole=whole,
        state=Path(state),
        programs=Path("/bin-of-version"),
        ports=plan.Ports(20001, 20002, 20003, 20004, 20005, 20006),
        token="secret-token",
        tools=TOOLS,
        cni_folder="/usr/lib/cni",
        cgroup_root="/lorapool-x",
    )


def test_a_plan_survives_being_written_down() -> None:
    whole = plan.plan(spec(whole=True))
    assert plan.Plan.from_json(whole.to_json()) == whole


def test_every_component_waits_only_for_components_that_exist() -> None:
    for whole in (True, False):
        components = plan.plan(spec(whole=whole)).components
        names = {c.name for c in components}
        assert all(set(c.after) <= names for c in components)


def test_the_api_server_mode_needs_no_forward_and_binds_loopback_only() -> None:
    decided = plan.plan(spec(whole=False))
    assert decided.forwards == {}
    assert [c.name for c in decided.components] == ["etcd", "kube-apiserver", "kube-controller-manager"]
    assert "0.0.0.0" not in decided.to_json()


def test_the_token_stands_in_files_and_never_on_a_command_line() -> None:
    decided = plan.plan(spec(whole=True))
    assert not any("secret-token" in argument for c in decided.components for argument in c.argv)
    assert "secret-token" in decided.files["admin.kubeconfig"]


def test_two_clusters_differ_only_in_what_the_host_sees() -> None:
    """Each cluster has the same addresses inside its own namespace, so none have to be allocated."""
    one, two = (plan.plan(spec(whole=True, state=f"/s/{name}")) for name in ("one", "two"))
    assert one.to_json().replace("/s/one", "/s/two") == two.to_json()


def test_kubernetes_is_old_enough_for_cgroup_version_one() -> None:
    assert pins.KUBERNETES.startswith("1.34.")


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone() -> None:
    me = ProcessId.of(os.getpid())
    assert me.alive()
    assert not ProcessId(me.pid, me.started_ticks + 1, me.boot).alive()
    assert not ProcessId(me.pid, me.started_ticks, "another boot").alive()


def test_a_tree_is_removed_and_what_its_links_point_to_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    tree = tmp_path / "tree"
    for number in range(200):
        folder = tree / f"layer-{number % 7}" / "usr" / f"{number}"
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (tree / "to-a-folder").symlink_to(outside)
    (tree / "layer-1" / "to-a-file").symlink_to(outside / "kept")
    (tree / "layer-2" / "to-nothing").symlink_to(tmp_path / "nothing")
    (tree / "layer-3" / "locked").mkdir(mode=0o500)
    trees.remove(tree)
    assert not tree.exists()
    assert (outside / "kept").read_text() == "kept"


def test_the_sandbox_image_is_one_layer_with_one_program(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(b"\x7fELF")
    oci.write_archive(program, "lorapool.local/pause:1", tmp_path / "image.tar")
    with tarfile.open(tmp_path / "image.tar") as archive:
        index = json.loads(archive.extractfile("index.json").read())  # type: ignore[union-attr]
        (manifest,) = index["manifests"]
        assert manifest["annotations"]["io.containerd.image.name"] == "lorapool.local/pause:1"
        assert f"blobs/sha256/{manifest['digest'].removeprefix('sha256:')}" in archive.getnames()


@pytest.mark.parametrize(
    "sources",
    [
        "deb http://mirror.example/debian bookworm main\n",
        "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n",
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n",
    ],
)
def test_the_mirror_comes_from_the_machines_own_apt_sources(sources: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPOOL_DEBIAN_MIRROR", raising=False)
    assert debian_mirror(sources) == "http://mirror.example/debian"


def test_a_machine_without_a_debian_mirror_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPOOL_DEBIAN_MIRROR", raising=False)
    with pytest.raises(ClusterError) as caught:
        debian_mirror("deb http://mirror.example/other jammy main\n")
    assert "LORAPOOL_DEBIAN_MIRROR" in caught.value.remedy
