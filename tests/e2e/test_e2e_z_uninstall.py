"""`helm upgrade` from an older CRD, then `helm uninstall`: the objects remain and can be deleted."""

import shutil
from pathlib import Path

from e2e_world import BASE, ROOT, World


def test_helm_upgrade_from_an_older_crd_and_uninstall(world: World, tmp_path: Path) -> None:
    chart = tmp_path / "lorapool"
    shutil.copytree(ROOT / "charts" / "lorapool", chart)
    values = tmp_path / "values.yaml"
    values.write_text(world.helm("get", "values", "lorapool", "-o", "yaml"))
    crd = chart / "files" / "crds" / "lorapool.dev_loraadapters.yaml"
    new = crd.read_text()
    crd.write_text(new.replace('name: "LAST-USED"', 'name: "USED-LONG-AGO"'))
    world.helm("upgrade", "lorapool", str(chart), "-f", str(values), "--wait", "--timeout", "3m")
    assert "USED-LONG-AGO" in world.kubectl("get", "crd", "loraadapters.lorapool.dev", "-o", "yaml")
    world.helm("upgrade", "lorapool", str(ROOT / "charts/lorapool"), "-f", str(values), "--wait", "--timeout", "3m")
    assert "USED-LONG-AGO" not in world.kubectl("get", "crd", "loraadapters.lorapool.dev", "-o", "yaml")
    assert world.chat("routing") == (world.answer("routing"), world.header("routing"))
    world.helm("test", "lorapool", "--timeout", "3m")

    world.helm("uninstall", "lorapool", "--wait", "--timeout", "3m")
    assert len(world.get("lora")["items"]) >= 5
    assert world.get("bm", BASE)["metadata"]["name"] == BASE
    world.kubectl("delete", "lora", "--all", "--timeout=30s", timeout_s=40)
    world.kubectl("delete", "bm", "--all", "--timeout=30s", timeout_s=40)
    world.wait("the runtime's end", lambda: not world.runtime_pods() or "pods", timeout_s=120)
