"""Everything an administrator may set of a runtime: one frozen model, read once in `__main__`.

From `LORAPOOL_RUNTIME_<FIELD>` in the environment and `--<field>` flags (flags win), plus LORAPOOL_TOKEN_SHA256.
Refuses unknown LORAPOOL_RUNTIME_ keys, and listening beyond loopback without a token.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorapool_api.protocol import ENV_TOKEN_SHA256, RUNTIME_PORT

ENV_PREFIX = "LORAPOOL_RUNTIME_"
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT|PORT)(_.*)?$")
"""What Kubernetes sets for every Service of the namespace: not ours, whatever the Service is called."""


class SettingsError(Exception):
    """A setting is missing, unknown or out of bounds; the message names it and its environment key."""


class RuntimeSettings(BaseModel):
    """Field by field: unit in the name, default, and why that default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    # --- the base -----------------------------------------------------------------------
    model: str = Field(min_length=1, max_length=512)
    """The base: a local folder, or hf://, oci://, s3:// or pvc://. No default: there is no base one could guess."""
    revision: str | None = None
    """Branch, tag or commit of an hf:// base; None: the source's default branch."""
    served_name: str | None = Field(default=None, max_length=128)
    """Model name of the base itself for requests without an adapter header; None: the last part of `model`."""
    base_label: str | None = Field(default=None, max_length=160)
    """`namespace/name` of the base, the `base` label of metrics; None: the served name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the files are stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when torch sees one."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Tokens of prompt and completion together; None: what the base was made for."""
    max_rank: int = Field(default=16, ge=1, le=256)
    """Memory of every slot is set aside for this rank; 16 covers most fine-tunes."""
    slots: int = Field(default=8, ge=1, le=1024)
    """Adapters on the device at one time."""
    max_batch: int = Field(default=32, ge=1, le=1024)
    """Sequences computed in one step at most."""
    max_batch_tokens: int = Field(default=512, ge=16)
    """Tokens computed in one step at most."""
    max_prefill_tokens: int | None = Field(default=None, ge=1)
    """Of prompts, in a step that also decodes: bounds how long one long prompt delays the others. None: 128 on a CPU,
    where each token costs; all of max_batch_tokens on a GPU, where they cost less than reading the weights."""
    prefix_cache: bool = True
    """Requests on the same weights (never others) share the computed beginning of their prompts. Whoever may call a
    model can then tell, by time and by `cached_tokens`, whether a beginning was sent lately: off where that matters."""
    kv_bytes: int | None = Field(default=None, ge=1)
    """Budget of the KV cache; None: a share of the memory that is free after loading the base."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None: the cores this process may use."""

    # --- the listener -------------------------------------------------------------------
    listen_host: str | None = None
    """None: all addresses when a token is set, else loopback only."""
    listen_port: int = Field(default=RUNTIME_PORT, ge=0, le=65535)
    """0 takes a free port (tests)."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """A second, open listener with nothing but /metrics (and /metrics/vllm, the names inference gateways read), for
    scrapers that cannot hold a token; None: none."""
    token_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """sha256 (hex) of the bearer token; set through LORAPOOL_TOKEN_SHA256. None: no check, loopback only."""
    body_max_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Longest request body: more than any base's context holds."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """A client that sends its body slower than this is dropped."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """A client that takes nothing for this long is dropped, so that it cannot hold a slot."""

    # --- waiting lines ------------------------------------------------------------------
    max_waiting: int = Field(default=256, ge=0)
    """Sequences beyond `max_batch` that may be open at one time; the next request gets 429."""
    max_load_waiting: int = Field(default=128, ge=1)
    """Requests that may wait for one adapter's load; the next gets 429."""

    # --- adapters -----------------------------------------------------------------------
    cache_dir: Path = Path("~/.cache/lorapool/artifacts")
    """Folder of fetched artifacts, by digest."""
    cache_bytes: int = Field(default=20 * 2**30, ge=2**20)
    """Bytes of adapters kept on disk; the least recently used leave first."""
    host_cache_bytes: int = Field(default=2**30, ge=0)
    """Bytes of adapters kept ready in host memory."""
    host_idle_s: float = Field(default=300.0, ge=0)
    """An adapter off the device and unused this long leaves host memory too."""
    pvc_root: Path = Path("/pvc")
    """Where claims are mounted: pvc://claim/path is read from <pvc_root>/<claim>/<path>."""
    fetch_timeout_s: float = Field(default=600.0, gt=0)
    """One adapter's fetch may take this long: 4 GiB at 7 MB/s."""
    retry_base_s: float = Field(default=5.0, gt=0)
    """First wait after a transient failure; doubles each time, with jitter."""
    retry_max_s: float = Field(default=300.0, gt=0)
    """Longest wait between two tries."""
    max_adapters: int = Field(default=20_000, ge=1)
    """Registered descriptors (6 KiB each); past it the cold one unused longest is forgotten (it is sent again)."""
    tracked_adapters: int = Field(default=1000, ge=0)
    """Adapters with metric series of their own; the others share the label __other__."""
    sweep_interval_s: float = Field(default=1.0, gt=0)
    """How often idleness is looked at; bounds how late an adapter is parked."""
    drain_adapter_s: float = Field(default=60.0, ge=0)
    """DELETE lets running requests of the adapter finish for this long, then ends them."""

    # --- leaving ------------------------------------------------------------------------
    drain_grace_s: float = Field(default=25.0, ge=0)
    """After SIGTERM running requests may finish for this long; below Kubernetes' 30 s default before SIGKILL."""
    drain_notice_s: float = Field(default=1.0, ge=0)
    """Even when idle, answer `draining` for this long first, so that gateways learn it before the socket closes."""

    # --- prompts ------------------------------------------------------------------------
    template_timeout_s: float = Field(default=5.0, gt=0)
    """Rendering a chat template may take this long."""
    grammar_timeout_s: float = Field(default=5.0, gt=0)
    """Compiling a schema or tools may take this long, the wait for others' included; milliseconds are usual."""
    tokenize_threads: int = Field(default=2, ge=1, le=32)
    """Threads that render and tokenize prompts, so that a long one does not delay the others."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """INFO: loads, unloads, failures; nothing per request."""

    @model_validator(mode="after")
    def _no_open_door(self) -> RuntimeSettings:
        if self.token_sha256 is None and not _is_loopback(self.host):
            raise ValueError(
                f"listen_host {self.host} can be reached from outside but no token is set: set {ENV_TOKEN_SHA256} "
                "(sha256 of the bearer token) or listen on 127.0.0.1"
            )
        return self

    @property
    def host(self) -> str:
        """Where to listen: loopback unless a token guards the door."""
        if self.listen_host is not None:
            return self.listen_host
        return "127.0.0.1" if self.token_sha256 is None else "0.0.0.0"

    @property
    def base_name(self) -> str:
        """The base's model name."""
        return self.served_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def label(self) -> str:
        return self.base_label or self.base_name


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> RuntimeSettings:
    """Settings from flags over environment over defaults. Raises SettingsError in one sentence per mistake."""
    values = _from_environ(environ)
    values.update(_from_flags(argv))
    try:
        return RuntimeSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(item["loc"], item["msg"]) for item in error.errors())) from error


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    fields = {ENV_PREFIX + name.upper(): name for name in RuntimeSettings.model_fields}
    values: dict[str, Any] = {}
    for key, value in environ.items():
        if key in fields:
            values[fields[key]] = value
        elif key.startswith(ENV_PREFIX) and not _SERVICE_LINK.fullmatch(key):
            raise SettingsError(f"unknown setting {key} in the environment; known: {', '.join(sorted(fields))}")
    if environ.get(ENV_TOKEN_SHA256):
        values["token_sha256"] = environ[ENV_TOKEN_SHA256]
    return {name: value for name, value in values.items() if value != ""}


def _from_flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="lorapool-runtime",
        description="Serve one base model and many LoRA adapters on it.",
        epilog=f"Each flag is also read from the environment as {ENV_PREFIX}<FLAG>.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in RuntimeSettings.model_fields.items():
        default = "required" if field.is_required() else f"default: {field.default}"
        text = f"{(field.description or '').strip()} ({default})".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), dest=name, help=text, metavar="VALUE")
    return vars(parser.parse_args(argv))


def _sentence(loc: tuple[int | str, ...], message: str) -> str:
    if not loc:
        return message.removeprefix("Value error, ")
    name = str(loc[0])
    key = ENV_TOKEN_SHA256 if name == "token_sha256" else ENV_PREFIX + name.upper()
    return f"--{name.replace('_', '-')} ({key}): {message}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
