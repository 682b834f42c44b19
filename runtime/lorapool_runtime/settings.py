"""The runtime's settings: one frozen model, read once in `__main__` and passed down.

Each setting is a `--<field>` flag and a LORAPOOL_RUNTIME_<FIELD> variable; the flag wins. Without a token the runtime
only listens on loopback.
"""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorapool_api.basemodel import PrefixSharing
from lorapool_api.protocol import ENV_TOKEN_SHA256, ENV_TOKEN_SHA256_FILE, RUNTIME_PORT
from lorapool_api.settings import Env, ServingSettings, read
from lorapool_artifacts.settings import SourceSettings
from lorapool_runtime.accelerators import expects_gpu


def _on_gpu(fields: dict[str, Any]) -> bool:
    return expects_gpu(fields.get("device", "auto"))


class RuntimeSettings(ServingSettings):
    """What an administrator may set of a runtime, from LORAPOOL_RUNTIME_<FIELD> or --<field>."""

    prefix: ClassVar[str] = "LORAPOOL_RUNTIME_"
    has_flags: ClassVar[bool] = True

    # --- the base -----------------------------------------------------------------------
    model: str = Field(min_length=1, max_length=512)
    """The base model: a local folder, or an hf://, oci://, s3:// or pvc:// source."""
    revision: str | None = None
    """Branch, tag or commit of an hf:// base; None: the source's default branch."""
    served_name: str | None = Field(default=None, max_length=128)
    """Model name of the base itself in requests without an adapter header; None: the last part of `model`."""
    base_label: str | None = Field(default=None, max_length=160)
    """`namespace/name` of the base, the `base` label of metrics; None: the served name."""
    engine: Literal["torch", "vllm"] = "torch"
    """Program that computes the model. vllm must be installed, in a version that this release supports."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """GPUs that share each layer of the base. It needs the engine vllm."""
    pipeline_parallel: int = Field(default=1, ge=1, le=64)
    """Parts into which the layers of the base are divided, each on `tensor_parallel` GPUs. It needs the engine vllm."""
    group_size: Annotated[int, Env("LORAPOOL_RUNTIME_GROUP_SIZE", "LWS_GROUP_SIZE")] = Field(default=1, ge=1, le=64)
    """Nodes that compute the base together, each with one runtime. It needs the engine vllm."""
    group_index: Annotated[int, Env("LORAPOOL_RUNTIME_GROUP_INDEX", "LWS_WORKER_INDEX")] = Field(default=0, ge=0)
    """Which of them this runtime is. 0 is the leader, which alone answers requests."""
    group_leader: Annotated[str | None, Env("LORAPOOL_RUNTIME_GROUP_LEADER", "LWS_LEADER_ADDRESS")] = None
    """Host name or address of the leader."""
    group_port: int = Field(default=29501, ge=1, le=65534)
    """TCP port of the leader at which the processes of vLLM meet. At the next one those of the runtimes do."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: as the files are stored; on a CPU without bfloat16 instructions, float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when torch finds one."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Prompt and completion tokens of one request together; None: the longest context of the base."""
    max_rank: int = Field(default=16, ge=1, le=256)
    """Every slot reserves memory for this rank; 16 covers most fine-tunes."""
    slots: int = Field(default=8, ge=1, le=1024)
    """Adapters on the device at one time."""
    max_batch: int = Field(default_factory=lambda fields: 256 if _on_gpu(fields) else 32, ge=1, le=1024)
    """Most sequences computed in one step. Default: 32 on a CPU, 256 on a GPU."""
    max_batch_tokens: int = Field(
        default_factory=lambda fields: max(2048 if _on_gpu(fields) else 512, fields.get("max_batch", 1)), ge=16
    )
    """Most tokens computed in one step. Default: 512 on a CPU, 2048 on a GPU, and at least max_batch."""
    max_prefill_tokens: int | None = Field(default=None, ge=1)
    """Most prompt tokens in a step that also decodes, which bounds how long one long prompt delays the others. None:
    128 on a CPU, where each token costs; max_batch_tokens on a GPU, where tokens cost less than reading the weights."""
    prefix_cache: bool = True
    """Requests on the same weights share the computed prefixes of their prompts; different weights never do."""
    prefix_sharing: PrefixSharing = PrefixSharing.TENANT
    """Who shares them: the callers of one tenant, or (Base) all callers. Who shares can find out, by timing and by
    `cached_tokens`, whether a prefix was sent recently. Callers that no gateway names are one tenant."""
    kv_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache; None: of the memory that is free after loading the base, 40 % on a CPU, and on a GPU 90 %
    of what the largest step leaves, which is measured."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None: the cores this process may use."""
    native: Annotated[Literal["auto", "0", "baseline", "avx2", "avx512"], Env("LORAPOOL_NATIVE")] = "auto"
    """Instruction set of the native CPU kernels. auto: the best of this CPU; 0: torch's operators only."""

    # --- the listener -------------------------------------------------------------------
    listen_host: str | None = None
    """None: all addresses when a token is set, else loopback only."""
    listen_port: int = Field(default=RUNTIME_PORT, ge=0, le=65535)
    """0 takes a free port (tests)."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """A second listener for probes and for scrapers that cannot hold the token, served in a thread of its own:
    /healthz, /readyz, /metrics, and /metrics/vllm with the names that inference gateways read. None: no such
    listener."""
    token_sha256: Annotated[str | None, Env(ENV_TOKEN_SHA256, "LORAPOOL_RUNTIME_TOKEN_SHA256")] = Field(
        default=None, pattern=r"^[0-9a-f]{64}$"
    )
    """SHA-256 (hex) of the bearer token. None here and in `token_sha256_file`: requests need no token, and only
    loopback is served."""
    token_sha256_file: Annotated[Path | None, Env(ENV_TOKEN_SHA256_FILE)] = None
    """A file with the SHA-256 (hex) of each valid bearer token, one per line. It is read again when it changes, so that
    a token can be replaced without a restart. Excludes `token_sha256`."""
    tls_dir: Path | None = None
    """Folder with tls.crt and tls.key, with which requests are served over HTTPS. They are read again when they change.
    None: plain HTTP. Without a usable certificate, the runtime does not start."""
    pod_uid: str | None = Field(default=None, max_length=128)
    """Uid of this pod, which the runtime proves when it is polled. None: polls need the bearer token."""
    body_max_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Longest request body, more than the context of any base holds."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """A client must send its whole body within this time."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """A client that reads nothing for this long is disconnected, so that it cannot hold a slot."""

    # --- queues -------------------------------------------------------------------------
    max_waiting: int = Field(default=256, ge=0)
    """Sequences beyond `max_batch` that may be queued; the next request gets 429."""
    max_load_waiting: int = Field(default=128, ge=1)
    """Requests that may wait for one adapter's load; the next gets 429."""

    # --- adapters -----------------------------------------------------------------------
    sources: SourceSettings = SourceSettings()
    """Endpoints and credentials of the artifact sources. Never flags, since any user of the machine can read those."""
    source_rules_file: Path | None = None
    """A JSON file (`SourceRules`) with the sources that each namespace may use, and with whose credentials. The
    operator writes it, and it is read for every use. None: every source is read with this runtime's credentials."""
    cache_dir: Path = Path("~/.cache/lorapool/artifacts")
    """Folder of fetched artifacts, by digest."""
    base_cache_dir: Path | None = None
    """Folder of fetched base models, by digest, which several pods may share. What is there is not fetched again, and
    an interrupted download is continued. None: `bases` in `cache_dir`, and counted in `cache_bytes`."""
    cache_bytes: int = Field(default=20 * 2**30, ge=2**20)
    """Bytes of adapters kept on disk; the least recently used are deleted first."""
    host_cache_bytes: int = Field(default=2**30, ge=0)
    """Bytes of adapters kept ready in host memory."""
    host_idle_s: float = Field(default=300.0, ge=0)
    """An adapter that is off the device and unused for this long is dropped from host memory too."""
    pvc_root: Path = Path("/pvc")
    """Folder of mounted claims: pvc://claim/path is read from <pvc_root>/<claim>/<path>."""
    fetch_timeout_s: float = Field(default=600.0, gt=0)
    """Longest fetch of one adapter: 4 GiB at 7 MB/s."""
    fetch_min_bytes_per_s: int = Field(default=64 * 1024, ge=0)
    """A source that sends fewer bytes per second for half a minute fails with SourceTimeout, and others are fetched."""
    retry_base_s: float = Field(default=5.0, gt=0)
    """First wait after a transient failure. It doubles each time, with jitter."""
    retry_max_s: float = Field(default=300.0, gt=0)
    """Longest wait between two attempts."""
    max_adapters: int = Field(default=20_000, ge=1)
    """Registered adapter descriptors (6 KiB each). Beyond it the least recently used descriptor that is not loaded is
    dropped; the gateway sends it again when needed."""
    tracked_adapters: int = Field(default=1000, ge=0)
    """Adapters with metric series of their own; the others share the label __other__."""
    sweep_interval_s: float = Field(default=1.0, gt=0)
    """Time between two checks for idle adapters; bounds how late one is unloaded."""
    min_residency_s: float = Field(default=1.0, ge=0)
    """An adapter keeps its slot for this long before it makes room for another one that requests wait for. Bounds the
    loads into one slot."""
    slot_wait_s: float = Field(default=30.0, gt=0)
    """An adapter that requests wait for is queued for a slot for this long; then they get 409 `no_slot`, and the
    gateway tries another replica. Adapters that cannot get one in time are refused at once."""
    preload_file: Path | None = None
    """A JSON file (`PreloadList`) with the adapters that are loaded at the start, before the runtime is ready. The
    operator writes it during rollouts. None, a missing or a malformed file: no adapter is."""
    preload_timeout_s: float = Field(default=30.0, ge=0)
    """The runtime is ready after this time at the latest, also if such an adapter still loads."""
    drain_adapter_s: float = Field(default=60.0, ge=0)
    """DELETE lets running requests of the adapter finish for this long, then ends them."""

    # --- usage --------------------------------------------------------------------------
    usage_dir: Path | None = None
    """Folder of the usage records that the ledger has not acknowledged, which the next process of the pod reads. None:
    they are in memory alone, and the oldest are given up beyond `usage_max_records`."""
    usage_max_records: int = Field(default=100_000, ge=1000)
    """Usage records kept until the ledger has them, about 50 MB. With `usage_dir`, the oldest beyond it are summed up,
    so that the totals stay exact."""
    usage_max_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Bytes of these records, likewise. The folder may need twice as much."""
    cost_prefill_ns: float = Field(default=4.0e6, ge=0, le=1e9)
    """What a token of a prompt costs. The time of each step of the engine is divided among its requests in the ratio of
    these four costs; `bench/cost_weights.py` fits them to a machine and a base."""
    cost_decode_ns: float = Field(default=4.7e6, ge=0, le=1e9)
    """What a generated token costs."""
    cost_context_ns: float = Field(default=2.6e3, ge=0, le=1e9)
    """What each token before it adds to the cost of a token."""
    cost_rank_ns: float = Field(default=1.45e4, ge=0, le=1e9)
    """What each rank of its adapter adds to the cost of a token."""

    # --- shutdown -----------------------------------------------------------------------
    drain_grace_s: float = Field(default=25.0, ge=0)
    """After SIGTERM running requests may finish for this long, below Kubernetes' default of 30 s before SIGKILL."""
    drain_notice_s: float = Field(default=1.0, ge=0)
    """Even when idle, `draining` is reported for this long, so that gateways learn it before the socket closes."""

    # --- prompts ------------------------------------------------------------------------
    chat_file: Path | None = None
    """A JSON file (`BaseChat`) with the chat template and stop tokens of the BaseModel, read again when it changes. The
    operator writes it. None or a missing file: the base's files decide."""
    template_timeout_s: float = Field(default=5.0, gt=0)
    """Longest rendering of a chat template. One that takes longer is stopped, and refused for a minute."""
    grammar_timeout_s: float = Field(default=5.0, gt=0)
    """Longest compilation of a schema or of tools, including the wait for others; milliseconds are usual."""
    tokenize_threads: int = Field(default=2, ge=1, le=32)
    """Threads that render and tokenize prompts, so that a long prompt does not delay the others."""

    @model_validator(mode="after")
    def _fit_the_engine(self) -> RuntimeSettings:
        if self.engine == "torch" and self.tensor_parallel * self.pipeline_parallel > 1:
            raise ValueError("tensor_parallel and pipeline_parallel need engine vllm: the engine torch uses one GPU")
        if self.group_size > 1:
            if self.engine == "torch":
                raise ValueError("a group of several nodes needs engine vllm: the engine torch uses one GPU")
            if self.group_leader is None or self.group_index >= self.group_size:
                raise ValueError(
                    f"group_index {self.group_index} of group_size {self.group_size} needs group_leader, the address "
                    "of the leader, and must be below the size"
                )
        if self.engine == "vllm" and (self.device != "auto" or self.max_prefill_tokens is not None):
            raise ValueError("device and max_prefill_tokens are of the engine torch: leave them out with engine vllm")
        return self

    @model_validator(mode="after")
    def _needs_a_token_beyond_loopback(self) -> RuntimeSettings:
        if not self.needs_token and not _is_loopback(self.host):
            raise ValueError(
                f"listen_host {self.host} is reachable from other machines but no token is set: set {ENV_TOKEN_SHA256} "
                f"(sha256 of the bearer token) or {ENV_TOKEN_SHA256_FILE}, or listen on 127.0.0.1"
            )
        if self.token_sha256 is not None and self.token_sha256_file is not None:
            raise ValueError(f"{ENV_TOKEN_SHA256} and {ENV_TOKEN_SHA256_FILE} are both set: set only one of them")
        return self

    @property
    def works_for_a_leader(self) -> bool:
        """Whether this runtime is a worker of a group, which answers no requests."""
        return self.group_size > 1 and self.group_index > 0

    @property
    def needs_token(self) -> bool:
        """Whether requests must carry a bearer token."""
        return self.token_sha256 is not None or self.token_sha256_file is not None

    @property
    def host(self) -> str:
        """The address to listen on: loopback unless a token is set."""
        if self.listen_host is not None:
            return self.listen_host
        return "0.0.0.0" if self.needs_token else "127.0.0.1"

    @property
    def base_name(self) -> str:
        """Model name of the base itself."""
        return self.served_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def label(self) -> str:
        """The `base` label of metrics and log lines."""
        return self.base_label or self.base_name


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> RuntimeSettings:
    """Settings from flags over environment over defaults. Raises SettingsError with one line per mistake."""
    return read(RuntimeSettings, environ, _from_flags(argv))


def _from_flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="lorapool-runtime",
        description="Serve one base model and many LoRA adapters on it.",
        epilog=f"Each flag is also read from the environment as {RuntimeSettings.prefix}<FLAG>.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in RuntimeSettings.model_fields.items():
        if name == "sources":
            continue
        default = " (required)" if field.is_required() else f" (default: {field.default})"
        if field.default_factory is not None:  # the description says how it follows from other settings
            default = ""
        text = f"{(field.description or '').strip()}{default}".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), dest=name, help=text, metavar="VALUE")
    return vars(parser.parse_args(argv))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
