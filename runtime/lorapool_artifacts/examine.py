"""Examines an adapter and reports every finding at once, where `inspect` stops at the first."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import AdapterConfig, read_adapter_config
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.checks.compatibility import AdapterFacts, Finding, all_findings, check_compatibility
from lorapool_artifacts.checks.header import ADAPTER_DTYPES, HeaderBounds, SafetensorsHeader
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ArtifactKind,
    RemoteFile,
    digest_of,
    select_files,
)
from lorapool_artifacts.inspect import read_header, read_json, with_hashes
from lorapool_artifacts.settings import AdapterLimits
from lorapool_artifacts.sources import Source

NOT_READ = frozenset(
    {
        FailureReason.SOURCE_NOT_FOUND,
        FailureReason.UNAUTHORIZED,
        FailureReason.INVALID_SOURCE,
        FailureReason.SOURCE_NOT_PERMITTED,
    }
)
"""Reasons, in addition to the transient ones, for which nothing is known about the adapter itself."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What is known about an adapter, as far as it can be read."""

    findings: tuple[Finding, ...]
    """Why it is refused; empty: it is accepted."""
    revision: str | None = None
    digest: str | None = None
    """None for an adapter that is refused."""
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    size_bytes: int | None = None

    @property
    def was_read(self) -> bool:
        """Whether the findings are about the adapter, and not about its source."""
        return not any(finding.reason.transient or finding.reason in NOT_READ for finding in self.findings)


def examine_adapter(source: Source, base: BaseFacts | None, limits: AdapterLimits) -> Examination:
    """Examines the adapter at a source, by itself or against a base. Blocks. Raises ArtifactError if unreadable."""
    try:
        files = select_files(ArtifactKind.ADAPTER, source.list_files(), where=source.where)
    except ArtifactError as error:
        return Examination((_finding(error),), source.revision)
    by_name = {file.name: file for file in files}
    size_bytes = sum(file.size_bytes for file in files)
    config, config_findings = _config(source, by_name[ADAPTER_CONFIG])
    header, header_findings = _header(source, by_name[ADAPTER_WEIGHTS], limits)
    findings = [*config_findings, *header_findings]
    if config is None or header is None:
        return Examination(tuple(findings), source.revision, size_bytes=size_bytes)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    facts = AdapterFacts(config, shapes, size_bytes)
    findings += all_findings(facts, base, limits)
    result = check_compatibility(facts, base, limits)
    digest = None if findings else digest_of(with_hashes(source, files))
    return Examination(tuple(findings), source.revision, digest, result.rank, result.target_modules, size_bytes)


def _config(source: Source, file: RemoteFile) -> tuple[AdapterConfig | None, tuple[Finding, ...]]:
    try:
        config, problems = read_adapter_config(read_json(source, file))
    except ArtifactError as error:
        return None, (_finding(error),)
    return config, tuple(map(_finding, problems))


def _header(
    source: Source, file: RemoteFile, limits: AdapterLimits
) -> tuple[SafetensorsHeader | None, tuple[Finding, ...]]:
    try:
        return read_header(source, file, HeaderBounds(limits.max_tensors, ADAPTER_DTYPES)), ()
    except ArtifactError as error:
        return None, (_finding(error),)


def _finding(error: ArtifactError) -> Finding:
    return Finding(error.reason, error.message)
