"""`lorapool inspect SOURCE [--base SOURCE]`: reports from a shell whether an adapter would be served.

It makes the checks of operator and runtime, with their defaults, with the credentials of the shell's environment, and
reports all findings at once. A source is a URI (hf://, oci://, s3://, pvc://) or a folder of this machine.

Exit status: 0 the adapter is accepted; 1 it is refused; 2 it could not be checked: a source cannot be read, or the
command line is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from lorapool_api.basemodel import BaseLora
from lorapool_api.settings import SettingsError
from lorapool_artifacts.chat_check import chat_refusal
from lorapool_artifacts.checks.compatibility import Finding
from lorapool_artifacts.deadline import Deadline, in_thread
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.examine import Examination, examine_adapter
from lorapool_artifacts.inspect import BaseFiles, base_files_from_folder, inspect_base, parse_source
from lorapool_artifacts.loaded_base import facts_of
from lorapool_artifacts.settings import AdapterLimits, FetchLimits, SourceSettings
from lorapool_artifacts.sources import Source, open_source
from lorapool_artifacts.sources.folder import FolderSource

ACCEPTED, REFUSED, NOT_CHECKED = range(3)
DEFAULT_MAX_RANK: int = BaseLora.model_fields["max_rank"].default
MAX_COLUMNS = 120


@dataclass(frozen=True, slots=True)
class Options:
    source: str
    revision: str | None
    base: str | None
    base_revision: str | None
    limits: AdapterLimits
    settings: SourceSettings
    as_json: bool


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = read_options(argv)
    except SettingsError as error:
        error.report("lorapool inspect")
        return NOT_CHECKED
    found = asyncio.run(_examine(options))
    print(json.dumps(as_object(options, found), indent=2) if options.as_json else "\n".join(as_text(options, found)))
    if not found.was_read:
        return NOT_CHECKED
    return REFUSED if found.findings else ACCEPTED


def read_options(argv: Sequence[str] | None) -> Options:
    """The command line. Raises SettingsError for the environment; ends the process with code 2 if the line is wrong."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="lorapool inspect",
        description=first.partition(": ")[2].capitalize(),
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="the adapter: hf://, oci://, s3:// or pvc:// URI, or a folder")
    add("--revision", help="branch, tag, commit or digest of the adapter (default: the source's own)")
    add("--base", metavar="SOURCE", help="the base model that it must fit (default: only the adapter is checked)")
    add("--base-revision", metavar="REVISION", help="the same for the base")
    add("--max-rank", type=int, default=DEFAULT_MAX_RANK, help="spec.lora.maxRank of the BaseModel (%(default)s)")
    add("--pvc-root", type=Path, metavar="FOLDER", help="folder that holds the claims of pvc:// by name")
    add("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    settings = SourceSettings.from_env(os.environ, pvc_root=given.pvc_root)
    limits = AdapterLimits(given.max_rank, settings.max_adapter_bytes, settings.max_tensors)
    return Options(given.source, given.revision, given.base, given.base_revision, limits, settings, given.json)


async def _examine(options: Options) -> Examination:
    try:
        files = await _base_files(options) if options.base else BaseFiles()
        base = await asyncio.to_thread(facts_of, files) if options.base else None
    except ArtifactError as error:
        return _failed(error, f"The base: {error.message}")
    deadline = Deadline(FetchLimits(), where=options.source)

    def run() -> Examination:
        with closing(_open(options.source, options.revision, options.settings, deadline)) as source:
            found = examine_adapter(source, base, options.limits)
            return _with_chat(options, found, source, files, deadline) if found.was_read else found

    try:
        return await in_thread(deadline, run)
    except ArtifactError as error:
        return _failed(error, error.message)


def _failed(error: ArtifactError, message: str) -> Examination:
    return Examination((Finding(error.reason, message),))


async def _base_files(options: Options) -> BaseFiles:
    assert options.base is not None
    if (folder := local_folder(options.base)) is not None:
        return await asyncio.to_thread(base_files_from_folder, folder, options.settings.max_tensors)
    return (await inspect_base(options.base, options.base_revision, options.settings)).files


def _with_chat(
    options: Options, found: Examination, source: Source, files: BaseFiles, deadline: Deadline
) -> Examination:
    """The examination, with what a runtime would refuse of the adapter's chat files."""
    if options.base is None:
        refused = chat_refusal(source, None, files.config)
    else:
        with closing(_open(options.base, options.base_revision, options.settings, deadline)) as base:
            refused = chat_refusal(source, base, files.config)
    if refused is None:
        return found
    return replace(found, findings=(*found.findings, Finding(refused.reason, refused.message)), digest=None)


def _open(text: str, revision: str | None, settings: SourceSettings, deadline: Deadline) -> Source:
    if (folder := local_folder(text)) is not None:
        return FolderSource.open(Path("/"), folder.parts[1:], where=text, deadline=deadline)
    return open_source(parse_source(text), revision, settings, deadline)


def local_folder(text: str) -> Path | None:
    """The folder that a source names on this machine, absolute; None for a URI, and for a name that is no folder."""
    path = Path(text).expanduser()
    return path.resolve() if "://" not in text and (path.is_dir() or text[:1] in ("/", ".", "~")) else None


def as_object(options: Options, found: Examination) -> dict[str, object]:
    """The result for programs."""
    return {
        "ok": not found.findings,
        "source": options.source,
        "base": options.base,
        "revision": found.revision,
        "digest": found.digest,
        "sizeBytes": found.size_bytes,
        "rank": found.rank,
        "targetModules": list(found.target_modules),
        "findings": [{"reason": each.reason.value, "message": each.message} for each in found.findings],
    }


def as_text(options: Options, found: Examination) -> Iterator[str]:
    """The result as a table for people, line by line."""
    rows = {
        "adapter": options.source,
        "base": options.base or "none given: only the adapter itself was checked",
        "revision": found.revision,
        "digest": found.digest,
        "size": found.size_bytes and f"{found.size_bytes:,} bytes",
        "rank": found.rank and f"{found.rank} of at most {options.limits.max_rank}",
        "modules": ", ".join(found.target_modules),
        "result": _result(found),
    }
    yield from (f"{name:<10}{value}" for name, value in rows.items() if value)
    columns = min(MAX_COLUMNS, shutil.get_terminal_size((MAX_COLUMNS, 0)).columns)
    for number, finding in enumerate(found.findings, 1):
        yield f"\n{number:>2}. {finding.reason.value}"
        yield textwrap.fill(finding.message, columns, initial_indent="    ", subsequent_indent="    ")


def _result(found: Examination) -> str:
    if not found.findings:
        return "accepted"
    if not found.was_read:
        return "not checked"
    return "refused" if len(found.findings) == 1 else f"refused, for {len(found.findings)} causes"


if __name__ == "__main__":
    sys.exit(main())
