"""Reads the objects from the YAML files of a folder, and again when a file changes.

A file with a mistake keeps the objects that it had before: an editor may have saved it half-way.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorapool_api.crd import KINDS
from lorapool_api.tuning.finetunejob import KIND as TUNING
from lorapool_gateway.routing.objects import ObjectRef
from lorapool_gateway.routing.source import ref_of
from lorapool_serve.objects import SECRET, Objects, Raw

NAMESPACE = "default"
SPEC_OF = {kind.kind: kind.spec for kind in KINDS if kind.kind != TUNING}

Found = dict[tuple[str, ObjectRef], Raw]


class FileError(Exception):
    """A file cannot be used; the message names the object and the field."""


@dataclass
class _File:
    stamp: tuple[int, int]
    objects: Found


class Folder:
    def __init__(self, path: Path, objects: Objects, report: Callable[[str], None]) -> None:
        """`report` receives one line for each mistake."""
        self._path = path
        self._objects = objects
        self._report = report
        self._files: dict[Path, _File] = {}
        self._known: Found = {}

    def read(self) -> None:
        """Puts what is new or changed into the objects, and deletes what no file contains any more."""
        paths = sorted(path for path in self._path.iterdir() if path.suffix in (".yaml", ".yml"))
        changed = self._files.keys() - set(paths)
        for gone in changed:
            del self._files[gone]
        for path in paths:
            if self._read_file(path):
                changed.add(path)
        if changed:
            self._publish()

    def _read_file(self, path: Path) -> bool:
        """Whether the file has changed since it was read."""
        try:
            stat = path.stat()
            stamp, before = (stat.st_mtime_ns, stat.st_size), self._files.get(path)
            if before is not None and before.stamp == stamp:
                return False
            self._files[path] = _File(stamp, before.objects if before is not None else {})
            self._files[path].objects = parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, FileError) as error:
            kept = "the objects it had before stay" if self._files.get(path, _File((0, 0), {})).objects else "ignored"
            self._report(f"{path.name}: {error}. Correct the file, it is then read again; {kept}.")
            return False
        return True

    def _publish(self) -> None:
        found: Found = {}
        for path, file in self._files.items():
            for key, raw in file.objects.items():
                if key in found:
                    self._report(f"{path.name}: {key[0]} {key[1]} is in another file as well. Rename one of the two.")
                    continue
                found[key] = raw
        for kind, ref in self._known.keys() - found.keys():
            self._objects.delete_object(kind, ref)
        for key, raw in found.items():
            if self._known.get(key) != raw:
                self._objects.put(raw)
        self._known = found


def parse(text: str) -> Found:
    """The objects of one file. Raises FileError."""
    try:
        documents = [item for item in yaml.safe_load_all(text) if item is not None]
    except yaml.YAMLError as error:
        raise FileError(f"not YAML: {' '.join(str(error).split())[:200]}") from error
    found: Found = {}
    for raw in documents:
        checked = _checked(raw)
        found[checked["kind"], ref_of(checked)] = checked
    return found


def _checked(raw: Any) -> Raw:
    """The object as an API server would store it. Raises FileError."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("metadata"), Mapping) or not raw["metadata"].get("name"):
        raise FileError("not a Kubernetes object: it needs kind and metadata.name")
    kind, name = raw.get("kind"), raw["metadata"]["name"]
    made: Raw = {**raw, "metadata": {"namespace": NAMESPACE, **raw["metadata"]}}
    if kind == SECRET:
        encoded = {
            key: base64.b64encode(str(text).encode()).decode() for key, text in raw.get("stringData", {}).items()
        }
        made["data"] = {**raw.get("data", {}), **encoded}
        return made
    if kind == TUNING:
        raise FileError(f"{kind} {name}: jobs are not served; train it with python -m lorapool_trainer --job FILE")
    if kind not in SPEC_OF:
        raise FileError(f"{kind} {name}: only {', '.join(SPEC_OF)} and {SECRET} can be served from a folder")
    try:
        spec = SPEC_OF[kind].model_validate(raw.get("spec") or {})
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(["spec", *(str(part) for part in wrong["loc"])])
        raise FileError(f"{kind} {name}: {field}: {wrong['msg']}") from error
    if unknown := _unknown(raw["spec"], spec.model_dump(by_alias=True, exclude_unset=True), "spec"):
        raise FileError(f"{kind} {name}: {unknown}: unknown field")
    return made


def _unknown(given: Mapping[str, Any], read: Mapping[str, Any], path: str) -> str:
    """The path of the first field that the model does not read, or ""."""
    for name, value in given.items():
        at = f"{path}.{name}"
        if name not in read:
            return at
        if isinstance(value, Mapping) and (deeper := _unknown(value, read[name], at)):
            return deeper
    return ""
