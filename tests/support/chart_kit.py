"""Renders the chart with the real Helm and checks the result.

`python tests/support/chart_kit.py` rewrites the table of values in the chart's README. No cluster is needed. A test is
skipped when `make binaries` has not built the program that it runs.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts" / "lorapool"
RELEASE = "lorapool"
NAMESPACE = "lorapool-system"

Manifest = dict[str, Any]

ALL_ON: dict[str, Any] = {
    "commonLabels": {"team": "ml"},
    "commonAnnotations": {"example.com/owner": "ml"},
    "watchNamespaces": ["team-a", "team-b"],
    "imagePullSecrets": [{"name": "pull"}],
    "image": {"registry": "registry.example:5000/ml", "control": {"digest": "sha256:" + "a" * 64}},
    "apiKeys": {"namespace": "lorapool-keys"},
    "artifacts": {
        "insecureRegistries": ["registry.example:5000"],
        "privateHosts": ["hub.lan"],
        "policy": {"team-b": {"prefixes": ["hf://team-b/"], "credentials": "Own", "credentialsSecret": "sources"}},
        "env": [{"name": "HF_ENDPOINT", "value": "http://hub.example"}],
        "credentials": {"existingSecret": "hub-credentials"},
    },
    "runtimeProfiles": {"gpu": {"resources": {"limits": {"nvidia.com/gpu": 1}}, "env": [{"name": "A", "value": "b"}]}},
    "operator": {"podLabels": {"a": "b"}, "priorityClassName": "high", "replicas": 2, "nodeSelector": {"a": "b"}},
    "gateway": {
        "autoscaling": {"enabled": True, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}}},
        "podLabels": {"a": "b"},
        "podAnnotations": {"example.com/a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "service": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0/8"], "nodePort": 30080},
        "extraEnv": [{"name": "LORAPOOL_GATEWAY_BODY_TIMEOUT_S", "value": "20"}],
    },
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": [{"host": "llm.example.com"}],
        "tls": [{"secretName": "tls", "hosts": ["llm.example.com"]}],
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.com"]},
    "networkPolicy": {"gatewayFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}], "sources": {"ports": [443]}},
    "metrics": {
        "serviceMonitor": {"enabled": True, "additionalLabels": {"release": "kps"}, "interval": "15s"},
        "podMonitor": {"enabled": True, "additionalLabels": {"release": "kps"}, "scrapeTimeout": "10s"},
        "prometheusRule": {"enabled": True, "additionalLabels": {"release": "kps"}, "alertLabels": {"team": "ml"}},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Lorapool"}},
    },
    "test": {"apiKeySecret": {"name": "test-key"}},
    "extraObjects": [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "{{ .Release.Name }}-extra"},
            "data": {"a": "b"},
        },
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: text\n",
    ],
}
"""Everything enabled, every list filled."""


def find_tool(name: str) -> Path | None:
    """A program that hack/cluster built, else one on the PATH, else None."""
    sys.path.append(str(REPOSITORY / "hack"))  # a script's package, not installed
    try:
        built = Path(importlib.import_module("cluster.programs.build").bin_dir()) / name
    finally:
        sys.path.pop()
    if built.exists():
        return built
    found = shutil.which(name)
    return Path(found) if found else None


def tool(name: str) -> Path:
    found = find_tool(name)
    if found is None:
        pytest.skip(f"{name} is not built: make binaries")
    return found


def run(
    name: str, *args: str | Path, cwd: Path | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program with a temporary HOME, so that no file of the user is read or written."""
    with tempfile.TemporaryDirectory() as home:
        env = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": str(Path(home) / "none")}
        return subprocess.run(
            [tool(name), *args],
            capture_output=True,
            text=True,
            timeout=120,
            env=env,
            cwd=cwd,
            check=False,
            input=text,
        )


@functools.lru_cache(maxsize=256)
def _template(values: str, release: str, namespace: str, nonce: int) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        return run("helm", "template", release, CHART, "--namespace", namespace, "--values", file.name)


def render(
    values: Mapping[str, Any] | None = None, *, release: str = RELEASE, namespace: str = NAMESPACE, nonce: int = 0
) -> list[Manifest]:
    """The release's objects, hooks included. Equal calls share one run of Helm; a new nonce causes another run."""
    result = _template(yaml.safe_dump(dict(values or {})), release, namespace, nonce)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader) if document]


def refusal(values: Mapping[str, Any]) -> str:
    """Helm's error message for values that it must refuse."""
    result = _template(yaml.safe_dump(dict(values)), RELEASE, NAMESPACE, 0)
    assert result.returncode != 0, f"these values were accepted: {values}"
    return result.stderr


def of_kind(manifests: Sequence[Manifest], kind: str) -> dict[str, Manifest]:
    """The objects of one kind by name, prefixed with the namespace when it is not the release's."""
    found = {}
    for manifest in manifests:
        if manifest["kind"] == kind:
            metadata = manifest["metadata"]
            namespace = metadata.get("namespace", NAMESPACE)
            found[metadata["name"] if namespace == NAMESPACE else f"{namespace}/{metadata['name']}"] = manifest
    return found


def pod_of(manifest: Manifest) -> Manifest | None:
    """The pod or pod template of a manifest, or None."""
    if manifest["kind"] == "Pod":
        return manifest
    pod = manifest.get("spec", {}).get("template") if manifest["kind"] in {"Deployment", "Job", "StatefulSet"} else None
    return pod if isinstance(pod, dict) else None


def environment(manifests: Sequence[Manifest], component: str) -> dict[str, str]:
    """The environment of a component's container, with example values for what the kubelet fills in."""
    pod = pod_of(of_kind(manifests, "Deployment")[f"{RELEASE}-{component}"])
    assert pod is not None
    examples = {"metadata.namespace": NAMESPACE, "metadata.name": f"{RELEASE}-{component}-abc"}
    result = {}
    for item in pod["spec"]["containers"][0]["env"]:
        source = item.get("valueFrom", {})
        if "fieldRef" in source:
            result[item["name"]] = examples[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" not in source:
            result[item["name"]] = item["value"]
    return result


# --- pod security ------------------------------------------------------------------------

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def grants(manifests: list[Manifest]) -> dict[str, list[str]]:
    """Component → one line per permission: namespace, resource and verbs."""
    roles = {
        (manifest["kind"], manifest["metadata"].get("namespace"), manifest["metadata"]["name"]): manifest["rules"]
        for manifest in manifests
        if manifest["kind"] in {"Role", "ClusterRole"}
    }
    result: dict[str, list[str]] = {}
    for manifest in manifests:
        if manifest["kind"] not in {"RoleBinding", "ClusterRoleBinding"}:
            continue
        [subject] = manifest["subjects"]
        assert subject["namespace"] == NAMESPACE
        namespace = manifest["metadata"].get("namespace")
        reference = manifest["roleRef"]
        rules = roles[(reference["kind"], namespace, reference["name"])]
        for rule in rules:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    what = f"{resource}.{group}" if group else resource
                    named = f" named {','.join(rule['resourceNames'])}" if "resourceNames" in rule else ""
                    where = f"in {namespace}" if namespace else "in every namespace"
                    line = f"{where}: {' '.join(rule['verbs'])} {what}{named}"
                    result.setdefault(subject["name"], []).append(line)
    return {name: sorted(lines) for name, lines in sorted(result.items())}


def restricted_violations(spec: Mapping[str, Any]) -> list[str]:
    """How a pod's spec violates Pod Security `restricted` or our rules: read-only root file system, resources."""
    wrong = []
    pod_context = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if spec.get(field):
            wrong.append(field)
    if pod_context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        wrong.append("seccompProfile is not RuntimeDefault")
    for volume in spec.get("volumes", []):
        kind = next(key for key in volume if key != "name")
        if kind not in _VOLUMES:
            wrong.append(f"volume {volume['name']} is a {kind}")
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        wrong += [f"{container['name']}: {what}" for what in _container_violations(container, pod_context)]
    return wrong


def _container_violations(container: Mapping[str, Any], pod_context: Mapping[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("privileged"):
        yield "privileged"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "capabilities are not dropped"
    if not context.get("runAsNonRoot", pod_context.get("runAsNonRoot")):
        yield "runAsNonRoot is not true"
    if context.get("runAsUser", pod_context.get("runAsUser", 0)) < 10000:
        yield "runAsUser below 10000"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root file system is writable"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort"
    resources = container.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
        yield "resources are not set"


# --- dashboards --------------------------------------------------------------------------

DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


def panels(file: Path) -> Iterator[dict[str, Any]]:
    for panel in json.loads(file.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def dashboard_expressions(
    *, base: str, adapter: str, window: str = "1m", span: str = "1h"
) -> Iterator[tuple[str, str]]:
    """Each PromQL expression and where it occurs, with Grafana's variables replaced by values."""
    variables = {"$__rate_interval": window, "$__range": span, "$base": base, "$adapter": adapter}
    for file in DASHBOARDS:
        for panel in panels(file):
            for target in panel["targets"]:
                expr = target["expr"]
                for name, value in variables.items():
                    expr = expr.replace(name, value)
                assert "$" not in expr, expr
                yield f"{file.stem}: {panel['title']}", expr


# --- values, their comments and the README's table ---------------------------------------

_KEY = re.compile(r"^( *)([A-Za-z_][A-Za-z0-9_]*):(?: (.*))?$")
_TABLE = re.compile(r"(<!-- values -->\n).*(<!-- /values -->)", re.S)


def documented_values() -> dict[str, str]:
    """The `# --` comment of every documented key of values.yaml, by dotted path."""
    found: dict[str, str] = {}
    path: list[str] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text[5:]]
        elif text.startswith("#") and comment:
            comment.append(text.lstrip("# "))
        elif match := _KEY.match(line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment:
                found[".".join(path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def default_values() -> dict[str, Any]:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert isinstance(values, dict)
    return values


def value_at(values: Mapping[str, Any], path: str) -> Any:
    here: Any = values
    for part in path.split("."):
        here = here[part]
    return here


def values_table() -> str:
    """The README's table of values, in Markdown."""
    defaults = default_values()
    rows = ["| value | default | what it does |", "|---|---|---|"]
    for path, comment in documented_values().items():
        default = yaml.safe_dump(value_at(defaults, path), default_flow_style=True, width=10**6)
        default = default.removesuffix("\n").removesuffix("\n...")
        shown = f"`{default}`" if len(default) <= 60 else "see values.yaml"
        rows.append(f"| `{path}` | {shown} | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def readme_with_table(text: str) -> str:
    return _TABLE.sub(lambda match: match[1] + values_table() + match[2], text)


if __name__ == "__main__":
    readme = CHART / "README.md"
    readme.write_text(readme_with_table(readme.read_text()))
