"""Jobs of a laptop: FineTuneJob objects in YAML files, data and results in folders of this machine.

The objects are those that a cluster takes, so a job can be tried here and applied there. Only their `data` differs: a
path (relative to the YAML file) or a file:// URI stands in place of a store's. `initFrom` names a folder of results, as
it names the LoraAdapter that a cluster makes of them. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import ValidationError

from lorapool_api.basemodel import TuningDefaults
from lorapool_api.common import API_VERSION
from lorapool_api.tuning.finetunejob import KIND, FineTuneJobSpec, LoraSettings
from lorapool_api.tuning.trainer_protocol import DEFAULT_BATCH_SIZE, DEFAULT_EPOCHS
from lorapool_artifacts.files import ADAPTER_CONFIG
from lorapool_trainer.jobs.order import ADAPTER, JobOrder

_STAND_IN = "store://local/files/"


class JobFileError(Exception):
    """A YAML file is no FineTuneJob that can be trained here; the message names the file and the field."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """`JobFiles` in folders of this machine: nothing is mirrored."""

    folder: Path
    training_path: Path
    validation_path: Path | None
    initial_path: Path | None = None

    def training(self) -> BinaryIO:
        return self.training_path.open("rb")

    def validation(self) -> BinaryIO | None:
        return None if self.validation_path is None else self.validation_path.open("rb")

    def initial(self) -> Path | None:
        return self.initial_path

    def restore(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, *names: str) -> None:
        pass

    def drop(self, name: str) -> None:
        pass


Jobs = list[tuple[JobOrder, LocalFiles]]


def read_jobs(path: Path, out: Path) -> Jobs:
    """The FineTuneJobs of a YAML file, which may hold several documents. Raises JobFileError."""
    try:
        documents = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobFileError(f"{path} cannot be read: {error}") from error
    if not documents:
        raise JobFileError(f"{path} holds no object; write a FineTuneJob, as docs/how-to/fine-tune.md shows.")
    return [_job(path, item, out) for item in documents]


def _job(path: Path, item: Any, out: Path) -> tuple[JobOrder, LocalFiles]:
    if not isinstance(item, dict) or item.get("kind") != KIND or item.get("apiVersion") != API_VERSION:
        raise JobFileError(f"{path} is no FineTuneJob: it needs `apiVersion: {API_VERSION}` and `kind: {KIND}`.")
    metadata = item.get("metadata") or {}
    name, namespace = metadata.get("name"), metadata.get("namespace", "default")
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise JobFileError(f"{path}: metadata.name must name the job, and the folder of its files.")
    spec = dict(item.get("spec") or {})
    paths = {use: _local_path(path, spec, use) for use in ("training", "validation")}
    training = paths["training"]
    if training is None:
        raise JobFileError(f"{path}: spec.data.training.uri must name the file of the training data.")
    parsed = _parsed(path, {**spec, "data": _with_stand_ins(spec["data"])})
    files = LocalFiles(out / name, training, paths["validation"], _initial_path(path, parsed, out))
    return _order(name, namespace, parsed), files


def _initial_path(path: Path, spec: FineTuneJobSpec, out: Path) -> Path | None:
    if spec.init_from is None:
        return None
    folder = out / spec.init_from.name / ADAPTER
    if not (folder / ADAPTER_CONFIG).is_file():
        raise JobFileError(
            f"{path}: spec.initFrom names {spec.init_from.name}, but {folder} holds no {ADAPTER_CONFIG}; train that "
            "job first, or put the adapter's folder there."
        )
    return folder


def _local_path(path: Path, spec: Mapping[str, Any], use: str) -> Path | None:
    data = spec.get("data")
    file = data.get(use) if isinstance(data, dict) else None
    uri = file.get("uri") if isinstance(file, dict) else None
    if not isinstance(uri, str):
        return None
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    if "://" in uri:
        raise JobFileError(f"{path}: spec.data.{use}.uri is {uri}; here it must be a path or a file:// URI.")
    return path.parent / Path(uri).expanduser()


def _with_stand_ins(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with URIs that the contract accepts, so that all else is checked as a cluster would."""
    uses = [use for use in ("training", "validation") if isinstance(data.get(use), dict)]
    return {**data, **{use: {**data[use], "uri": _STAND_IN + use} for use in uses}}


def _parsed(path: Path, spec: Mapping[str, Any]) -> FineTuneJobSpec:
    try:
        parsed = FineTuneJobSpec.model_validate(spec)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, ("spec", *first["loc"])))
        raise JobFileError(f"{path}: {where}: {first['msg']}.") from error
    return parsed


def _order(name: str, namespace: str, spec: FineTuneJobSpec) -> JobOrder:
    defaults = TuningDefaults()
    numbers = {
        "epochs": spec.training.epochs or DEFAULT_EPOCHS,
        "batch_size": spec.training.batch_size or DEFAULT_BATCH_SIZE,
        "learning_rate": spec.training.learning_rate or defaults.learning_rate,
    }
    return JobOrder(
        uid=name,
        display=f"{namespace}/{name}",
        data=spec.data,
        lora=spec.lora if spec.init_from is not None else _resolved(spec.lora, defaults.rank),
        training=spec.training.model_copy(update=numbers),
        checkpoints=spec.checkpoints,
        priority=spec.priority,
        run=spec.run,
    )


def _resolved(lora: LoraSettings, default: int) -> LoraSettings:
    rank = lora.rank or default
    return lora.model_copy(update={"rank": rank, "alpha": lora.alpha or 2 * rank})


def base_identity(folder: Path) -> str:
    """Changes when files of the base are exchanged: their names, sizes and the content of the small ones."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            size = path.stat().st_size
            found.update(f"{path.name}\0{size}\0".encode())
            found.update(path.read_bytes() if path.suffix == ".json" and size < 2**20 else b"")
    return f"files:{found.hexdigest()[:32]}"
