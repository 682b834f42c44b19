"""The cluster's own certificate authority and the certificates it signs; made once per state folder by openssl.

The authority signs the API server's certificate (for all its addresses) and one client certificate per component, so
that each component has only its built-in RBAC role.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import StartFailedError
from cluster.programs.install import require

_DAYS = "3650"

# file -> (user, group): Kubernetes reads them from the subject
CLIENTS = {
    "kubelet-client": ("kube-apiserver", "system:masters"),  # the API server, when it calls the kubelet
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": ("system:node:node1", "system:nodes"),
    "kube-proxy": ("system:kube-proxy", ""),
    "discovery": ("local-cluster:discovery", "local-cluster"),  # CoreDNS and Prometheus
}


def ensure(folder: Path, addresses: Sequence[str]) -> None:
    """Makes keys and certificates unless the folder has its `complete` mark. Raises StartFailedError."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _openssl("genrsa", "-out", str(folder / "service-accounts.key"), "2048")
    _self_signed(folder)
    _issue(folder, "apiserver", "/CN=kube-apiserver", "serverAuth", addresses)
    for name, (user, group) in CLIENTS.items():
        _issue(folder, name, (f"/O={group}" if group else "") + f"/CN={user}", "clientAuth")
    (folder / "complete").touch()


def _self_signed(folder: Path) -> None:
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"),
        *("-days", _DAYS, "-subj", "/CN=lorapool local cluster"),
        *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt")),
    )


def _issue(folder: Path, name: str, subject: str, usage: str, addresses: Sequence[str] = ()) -> None:
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    lines = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        f"extendedKeyUsage={usage}",
        "subjectKeyIdentifier=hash",
        "authorityKeyIdentifier=keyid",
    ]
    if addresses:
        kinds = [("IP:" if a.replace(".", "").isdigit() else "DNS:") + a for a in addresses]
        lines.append("subjectAltName=" + ",".join(kinds))
    extensions.write_text("\n".join(lines) + "\n")
    _openssl(
        *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"),
        *("-subj", subject, "-keyout", str(folder / f"{name}.key"), "-out", str(request)),
    )
    _openssl(
        *("x509", "-req", "-sha256", "-days", _DAYS, "-in", str(request), "-extfile", str(extensions)),
        *("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key")),
        *("-set_serial", f"0x{os.urandom(8).hex()}", "-out", str(folder / f"{name}.crt")),
    )
    request.unlink()
    extensions.unlink()


def _openssl(*arguments: str) -> None:
    done = subprocess.run([require("openssl"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StartFailedError(
            f"openssl {arguments[0]} failed", log_tail=done.stderr, remedy="needs OpenSSL 1.1.1 or later"
        )
