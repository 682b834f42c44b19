"""Inspects an adapter or a base at its source, without downloading its weights.

Only settings and headers are read. Hashes come from the source's listing; a file listed without a hash is streamed
and hashed, bounded by the limits. A source or a file that cannot be used raises ArtifactError; an adapter that does
not fit its base is a result.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import load_json_object, parse_adapter_config, refuse_code
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.checks.causes import refusal
from lorapool_artifacts.checks.compatibility import AdapterFacts, CompatibilityResult, check_compatibility
from lorapool_artifacts.checks.header import (
    ADAPTER_DTYPES,
    LENGTH_BYTES,
    HeaderBounds,
    SafetensorsHeader,
    header_length,
    parse_header,
)
from lorapool_artifacts.deadline import Deadline, in_thread
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    TOKENIZER_CONFIG,
    ArtifactKind,
    RemoteFile,
    digest_of,
    files_of,
    select_files,
    weights_of,
)
from lorapool_artifacts.settings import MAX_JSON_BYTES, MAX_TENSORS, MIB, AdapterLimits, FetchLimits, SourceSettings
from lorapool_artifacts.sources import Source, open_source, read_range
from lorapool_artifacts.sources.folder import FolderSource
from lorapool_artifacts.uri import ArtifactUri, HfUri, OciUri, PvcUri, S3Uri, StoreUri, parse_uri

FIRST_READ_BYTES = 64 * 1024
"""Contains the whole header of most adapters, so that one request is enough."""

MAX_UNHASHED_BASE_BYTES = 64 * MIB
"""Files of a base that are listed without a hash are hashed up to this total size; beyond it the digest is only known
after the first fetch."""


_ONE_HEADER = threading.Lock()
"""Held while a header is parsed and checked, which takes memory in proportion to its tensors and the interpreter
anyway. It is never held while a source is read."""

UNVERSIONED = ("pvc://", "s3://", "store://")
"""Sources without revisions: what was overwritten is lost."""


@dataclass(frozen=True, slots=True)
class AdapterInspection:
    """An adapter's properties and whether it fits its base."""

    revision: str
    digest: str | None
    """None only when the adapter does not fit and the source lists no hashes."""
    weights_digest: str | None
    """Of the weights and their config alone; None as for `digest`."""
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    compatibility: CompatibilityResult


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """What the files of a base show without loading it. Adapters are checked against the loaded base only."""

    config: Mapping[str, object] = field(default_factory=dict)
    """The content of config.json."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of each tensor, by its name in the files."""
    names: frozenset[str] = frozenset()
    """Names of the base that trainers may have recorded in adapters."""


@dataclass(frozen=True, slots=True)
class BaseInspection:
    """A base's properties."""

    revision: str
    digest: str | None
    """None when the source lists no hashes; the first fetch computes it."""
    files: BaseFiles
    size_bytes: int


async def inspect_adapter(
    uri: str,
    revision: str | None,
    expected_digest: str | None,
    base_facts: BaseFacts | None,
    limits: AdapterLimits,
    settings: SourceSettings,
    *,
    fetch_limits: FetchLimits | None = None,
) -> AdapterInspection:
    """Checks the adapter at `uri` against a base, or by itself when `base_facts` is None. Raises ArtifactError."""
    parsed = parse_source(uri)
    bounds = replace(fetch_limits or FetchLimits(), max_total_bytes=limits.max_bytes)
    deadline = Deadline(bounds, where=str(parsed))

    limits = replace(limits, max_tensors=settings.max_tensors)

    def run() -> AdapterInspection:
        source = open_source(parsed, revision, settings, deadline)
        try:
            return inspect_adapter_source(source, expected_digest, base_facts, limits)
        finally:
            source.close()

    return await in_thread(deadline, run)


async def inspect_base(
    uri: str, revision: str | None, settings: SourceSettings, *, fetch_limits: FetchLimits | None = None
) -> BaseInspection:
    """Reads the properties of the base at `uri` that adapters depend on. Raises ArtifactError."""
    parsed = parse_source(uri)
    deadline = Deadline(fetch_limits or FetchLimits(), where=str(parsed))

    def run() -> BaseInspection:
        source = open_source(parsed, revision, settings, deadline)
        try:
            files = select_files(ArtifactKind.BASE, source.list_files(), where=source.where)
            check_total(ArtifactKind.BASE, files, settings.base_max_bytes, source.where)
            found = _base_files(source, files, settings.max_tensors, *names_of(parsed))
            unhashed = sum(file.size_bytes for file in files if file.sha256 is None)
            if unhashed <= MAX_UNHASHED_BASE_BYTES:
                files = with_hashes(source, files)
            return BaseInspection(source.revision, digest_of(files), found, sum(file.size_bytes for file in files))
        finally:
            source.close()

    return await in_thread(deadline, run)


def inspect_adapter_folder(path: Path, base_facts: BaseFacts | None, limits: AdapterLimits) -> AdapterInspection:
    """`inspect_adapter` for a local folder. Blocks. Raises ArtifactError."""
    return inspect_adapter_source(FolderSource.open(path), None, base_facts, limits)


def base_files_from_folder(path: Path, max_tensors: int = MAX_TENSORS) -> BaseFiles:
    """What the files of a base in a local folder show. Blocks. Raises ArtifactError."""
    source = FolderSource.open(path)
    files = select_files(ArtifactKind.BASE, source.list_files(), where=source.where)
    return _base_files(source, files, max_tensors)


def check_files(kind: ArtifactKind, source: FolderSource, files: Sequence[RemoteFile], max_tensors: int) -> None:
    """Parses the fetched files, so that a damaged artifact is never published. Blocks. Raises ArtifactError."""
    try:
        if kind is ArtifactKind.BASE:
            _base_files(source, files, max_tensors)
            for file in files:
                if file.name == TOKENIZER_CONFIG:
                    refuse_code(load_json_object(read_json(source, file), name=file.name), name=file.name)
            return
        by_name = {file.name: file for file in files}
        parse_adapter_config(read_json(source, by_name[ADAPTER_CONFIG]))
        read_header(source, by_name[ADAPTER_WEIGHTS], HeaderBounds(max_tensors, ADAPTER_DTYPES))
    finally:
        source.close()


def inspect_adapter_source(
    source: Source, expected_digest: str | None, base_facts: BaseFacts | None, limits: AdapterLimits
) -> AdapterInspection:
    """Checks the adapter first and hashes its files only when it fits. Blocks. Raises ArtifactError."""
    files = select_files(ArtifactKind.ADAPTER, source.list_files(), where=source.where)
    check_total(ArtifactKind.ADAPTER, files, limits.max_bytes, source.where)
    by_name = {file.name: file for file in files}
    raw = read_json(source, by_name[ADAPTER_CONFIG])
    files = files_of(expected_digest, _with_known(files, ADAPTER_CONFIG, hashlib.sha256(raw).hexdigest()))
    digest = digest_of(files)
    if digest is not None:
        check_digest(digest, expected_digest, source.where)
    config = parse_adapter_config(raw)
    bounds = HeaderBounds(limits.max_tensors, ADAPTER_DTYPES)
    prefix = read_prefix(source, by_name[ADAPTER_WEIGHTS], bounds)
    size_bytes = sum(file.size_bytes for file in files)
    with _ONE_HEADER:
        header = parse_header(prefix, by_name[ADAPTER_WEIGHTS].size_bytes, bounds, name=ADAPTER_WEIGHTS)
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        result = check_compatibility(AdapterFacts(config, shapes, size_bytes), base_facts, limits)
        del prefix, header, shapes
    if result.ok and digest is None:
        files = files_of(expected_digest, with_hashes(source, files))
        digest, size_bytes = digest_of(files), sum(file.size_bytes for file in files)
        check_digest(digest, expected_digest, source.where)
    weights_digest = digest_of(weights_of(files))
    return AdapterInspection(
        source.revision, digest, weights_digest, result.rank, result.target_modules, size_bytes, result
    )


def read_header(source: Source, file: RemoteFile, bounds: HeaderBounds) -> SafetensorsHeader:
    """The header of a safetensors file at its source. Raises ArtifactError."""
    return parse_header(read_prefix(source, file, bounds), file.size_bytes, bounds, name=file.name)


def read_prefix(source: Source, file: RemoteFile, bounds: HeaderBounds) -> bytes:
    """The first bytes of a safetensors file with its whole header: one range read, or two when the header is long."""
    prefix = read_range(source, file.name, 0, min(file.size_bytes, FIRST_READ_BYTES))
    wanted = LENGTH_BYTES + header_length(prefix, file.size_bytes, bounds, name=file.name)
    if wanted > len(prefix):
        prefix += read_range(source, file.name, len(prefix), wanted - len(prefix))
    return prefix


def read_json(source: Source, file: RemoteFile) -> bytes:
    """The content of a small file, checked against its hash where the source lists one. Raises ArtifactError."""
    if file.size_bytes > MAX_JSON_BYTES:
        raise refusal("config-too-long", file=f"{source.where}: {file.name}", bound=MAX_JSON_BYTES)
    raw = read_range(source, file.name, 0, file.size_bytes)
    if file.sha256 is not None and hashlib.sha256(raw).hexdigest() != file.sha256:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{source.where}: {file.name} does not have the listed hash; upload it again.",
        )
    return raw


def check_total(kind: ArtifactKind, files: Sequence[RemoteFile], max_bytes: int, where: str) -> None:
    """Raises ArtifactError (TooLarge) when the listed sizes exceed `max_bytes`."""
    total = sum(file.size_bytes for file in files)
    if total > max_bytes:
        cause = "base-too-large" if kind is ArtifactKind.BASE else "too-large"
        raise refusal(cause, where=where, size=total, bound=max_bytes)


def check_digest(digest: str | None, expected: str | None, where: str) -> None:
    """Raises ArtifactError (DigestMismatch) when the object pins other content."""
    if expected is not None and digest != expected:
        remedy = "correct spec.source.digest or pin the revision"
        if where.startswith(UNVERSIONED):
            remedy = (
                "the files were overwritten: restore them, or change the annotation lorapool.dev/retry to serve these"
            )
        message = f"{where} holds {digest}, not {expected}, which was checked or is pinned; {remedy}."
        raise ArtifactError(FailureReason.DIGEST_MISMATCH, message)


def parse_source(uri: str) -> ArtifactUri:
    """`parse_uri`, but raises ArtifactError (InvalidSource)."""
    try:
        return parse_uri(uri)
    except ValueError as error:
        raise ArtifactError(FailureReason.INVALID_SOURCE, f"{error}.") from error


def names_of(uri: ArtifactUri) -> tuple[str, ...]:
    """Names under which training tools may record this source."""
    match uri:
        case HfUri(repo=repo, path=path) | OciUri(repo=repo, path=path):
            return (repo, path.rpartition("/")[2]) if path else (repo,)
        case S3Uri(prefix=path) | PvcUri(path=path) | StoreUri(key=path):
            return (path.rpartition("/")[2],) if path else ()


def _base_files(source: Source, files: Sequence[RemoteFile], max_tensors: int, *names: str) -> BaseFiles:
    config: Mapping[str, object] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.name == BASE_CONFIG:
            config = load_json_object(read_json(source, file), name=file.name)
            refuse_code(config, name=file.name)
        elif file.name.endswith(".safetensors"):
            header = read_header(source, file, HeaderBounds(max_tensors))
            shapes.update((name, tensor.shape) for name, tensor in header.tensors.items())
    recorded = config.get("_name_or_path")
    known = (*names, recorded) if isinstance(recorded, str) else names
    return BaseFiles(config, shapes, frozenset(name for name in known if name))


def _with_known(files: Sequence[RemoteFile], name: str, sha256: str) -> tuple[RemoteFile, ...]:
    return tuple(replace(file, sha256=sha256) if file.name == name else file for file in files)


def with_hashes(source: Source, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files with all their hashes. Those that the source does not list are computed. Raises ArtifactError."""
    return tuple(file if file.sha256 else replace(file, sha256=_hash(source, file)) for file in files)


def _hash(source: Source, file: RemoteFile) -> str:
    total, count = hashlib.sha256(), 0
    for chunk in source.stream(file.name):
        count += len(chunk)
        if count > file.size_bytes:
            break
        total.update(chunk)
    if count != file.size_bytes:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{source.where}: {file.name} is not {file.size_bytes} bytes long as listed; upload it again.",
        )
    return total.hexdigest()
