"""The images' bill of materials, and the audit of the locked dependencies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class Advisories(BaseHTTPRequestHandler):
    """Answers as an OSV server that knows one vulnerability, of aiohttp."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = {
            "id": "PYSEC-1", "summary": "x", "details": "x", "aliases": [], "published": "2026-01-01T00:00:00Z",
            "affected": [{"package": {"name": "aiohttp", "ecosystem": "PyPI"}, "ranges": []}],
        }  # fmt: skip
        body = json.dumps({"vulns": [known]} if query["package"]["name"] == "aiohttp" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def advisories() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    server.shutdown()
    thread.join()
    server.server_close()


def audit(url: str, home: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--vulnerability-service", "osv", "--osv-url", url, "--cache-dir", str(home), "--timeout", "5"]
    return subprocess.run(
        [sys.executable, str(ROOT / "hack" / "audit.py"), *arguments], capture_output=True, text=True, check=False
    )


def test_an_audit_without_a_network_is_skipped_in_words_and_fails_for_a_known_vulnerability(
    advisories: str, tmp_path: Path
) -> None:
    away = audit("http://127.0.0.1:1/v1/query", tmp_path)
    assert away.returncode == 0, away
    assert away.stdout.count("skipped, because no advisories can be reached") == 2
    known = audit(advisories, tmp_path)
    assert known.returncode == 1, known
    assert "PYSEC-1" in known.stdout
