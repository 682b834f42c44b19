"""The images' bill of materials."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "hack"))

from images import sbom  # noqa: E402  # found through the line above

STATUS = """Package: base-files
Status: install ok installed
Architecture: amd64
Version: 12.4+deb12u5

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u7
"""


def test_a_bill_of_materials_lists_the_packages_of_debian_and_of_python(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(STATUS)
    package = tmp_path / "opt/lorapool/lib/python3.11/site-packages/Google_Re2-1.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: Google_Re2\nVersion: 1.1\nLicense-Expression: BSD-3-Clause\n"
    )
    document = json.loads(sbom.document(tmp_path, "lorapool-control", "k-1"))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "lorapool-control"
    assert sorted(component["purl"] for component in document["components"]) == [
        "pkg:deb/debian/base-files@12.4%2Bdeb12u5?arch=amd64",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u7?arch=amd64",
        "pkg:pypi/google-re2@1.1",
    ]
    licenses = [component["licenses"] for component in document["components"] if component["name"] == "google-re2"]
    assert licenses == [[{"license": {"id": "BSD-3-Clause"}}]]


@pytest.mark.parametrize("target", ["control", "runtime"])
def test_both_images_run_as_a_user_that_is_not_root(target: str) -> None:
    stage = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S)
    assert stage is not None
    assert re.findall(r"^USER (.*)$", stage[1], re.M) == ["65532:65532"]
    assert re.search(r"^(RUN|COPY|ADD) ", stage[1].partition("\nUSER ")[2], re.M) is None, (
        "nothing is written as root after it"
    )
