"""The settings of `python -m lorapool_trainer serve`, from LORAPOOL_TRAINER_<FIELD>."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lorapool_api.protocol import ENV_TOKEN_SHA256, ENV_TOKEN_SHA256_FILE
from lorapool_api.settings import Env, ServingSettings
from lorapool_api.tuning.finetunejob import Numerics
from lorapool_api.tuning.trainer_protocol import TRAINER_PORT
from lorapool_artifacts.settings import SourceSettings
from lorapool_runtime.settings import RuntimeSettings


class TrainerSettings(ServingSettings):
    """What the operator sets of a trainer."""

    prefix: ClassVar[str] = "LORAPOOL_TRAINER_"

    model: str = Field(min_length=1, max_length=512)
    """The base model: a local folder, or an hf://, oci://, s3:// or pvc:// source."""
    revision: str | None = None
    """Branch, tag or commit of an hf:// base; None: the source's default branch."""
    base_label: str | None = Field(default=None, max_length=160)
    """`namespace/name` of the base, the `base` label of metrics; None: the last part of `model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights. auto: as the files are stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when torch finds one."""
    numerics: Numerics | None = None
    """None: Exact on a CPU, Fast on a GPU. A job that asks for the other one is refused."""
    max_rank: int = Field(default=16, ge=1, le=256)
    """Jobs of a larger rank are refused."""
    max_jobs: int = Field(default=8, ge=1, le=64)
    """Jobs that train at the same time; others wait."""
    tokens_per_cycle: int = Field(default=2048, ge=16)
    """Tokens of all jobs that are computed together."""
    idle_after_s: float = Field(default=120.0, gt=0)
    """The process ends after so long without a job that can be trained."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None: the cores this process may use. Results on a CPU depend on it."""
    listen_host: str | None = None
    """None: all addresses when a token is set, else loopback only."""
    listen_port: int = Field(default=TRAINER_PORT, ge=0, le=65535)
    """0 takes a free port (tests)."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """A second listener for probes and scrapers: /healthz, /readyz and /metrics. None: no such listener."""
    token_sha256: Annotated[str | None, Env(ENV_TOKEN_SHA256)] = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 (hex) of the bearer token. None here and in `token_sha256_file`: requests need no token."""
    token_sha256_file: Annotated[Path | None, Env(ENV_TOKEN_SHA256_FILE)] = None
    """A file with the SHA-256 (hex) of each valid bearer token, one per line, read again when it changes."""
    tls_dir: Path | None = None
    """Folder with tls.crt and tls.key, with which requests are served over HTTPS. None: plain HTTP."""
    pod_uid: str | None = Field(default=None, max_length=128)
    """Uid of this pod, which is proved to whom polls. None: polls need the bearer token."""
    sources: SourceSettings = SourceSettings()
    """Endpoints and credentials of the source of the base."""
    cache_dir: Path = Path("~/.cache/lorapool/trainer")
    """Folder of the jobs' files and, without `base_cache_dir`, of the base's. It should outlive a restart of the
    process, so that one that dies again and again at the same job is noticed."""
    cache_bytes: int = Field(default=20 * 2**30, ge=2**20)
    """Bytes of the base's files that are kept in `cache_dir`."""
    base_cache_dir: Path | None = None
    """Folder of fetched base models, by digest, which several pods may share."""
    pvc_root: Path = Path("/pvc")
    """Folder of mounted claims: pvc://claim/path is read from <pvc_root>/<claim>/<path>."""
    source_rules_file: Path | None = None
    """Accepted because every pod of a base has it; a job's files are reached with the token that came with the job."""
    chat_file: Path | None = None
    """A JSON file (`BaseChat`) with the chat template and stop tokens of the BaseModel, read at the start. The operator
    writes it. None or a missing file: the base's files decide."""
    native: Annotated[str, Env("LORAPOOL_NATIVE")] = "auto"
    """Accepted because the profile of the runtimes may set it; training uses torch's operators."""
    memory_bytes: int | None = Field(default=None, ge=2**20)
    """Memory that jobs are admitted by; None: that of the device or of the container."""
    drain_grace_s: float = Field(default=25.0, ge=0)
    """After SIGTERM the cycle and the checkpoints may take so long."""

    @property
    def needs_token(self) -> bool:
        return self.token_sha256 is not None or self.token_sha256_file is not None

    @property
    def host(self) -> str:
        """The address to listen on: loopback unless a token is set."""
        return self.listen_host or ("0.0.0.0" if self.needs_token else "127.0.0.1")

    @property
    def label(self) -> str:
        return self.base_label or self.model.rstrip("/").rpartition("/")[2]

    def of_base(self) -> RuntimeSettings:
        """The settings by which the runtime finds and fetches the base's folder."""
        return RuntimeSettings(
            model=self.model,
            revision=self.revision,
            base_label=self.base_label,
            sources=self.sources,
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
            base_cache_dir=self.base_cache_dir,
            pvc_root=self.pvc_root,
        )
