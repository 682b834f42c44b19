"""The trainer protocol: JSON over HTTP, between the trainer of a base as server and the operator as client.

`GET /v1/trainer` is polled with a proof, and all other routes but the health routes require the bearer token of the
base, exactly as with a runtime (`protocol`). A trainer keeps nothing that is only in its memory: checkpoints, events
and the report of an ended job are in the folder of the job, so that a new trainer continues where it ended.

1. `PUT /v1/jobs/{uid}` registers a job, and later changes `run` and `priority`. The same body again changes nothing.
   A job whose last report is in its folder has ended: it is reported as it is, and not trained again.
2. `DELETE /v1/jobs/{uid}` stops the job, without a checkpoint, and forgets it. It is answered once nothing is written
   any more. An unknown job is no error.
3. The process ends with 0 after `idle_after_s` in which no registered job could be trained, and on SIGTERM after the
   cycle and a checkpoint of each job.
"""

from __future__ import annotations

from pydantic import Field

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import DIGEST_PATTERN, ApiModel, duration_s
from lorapool_api.protocol import ErrorDetail, SourceRef, StartupReport
from lorapool_api.store_protocol import StoreAccess
from lorapool_api.tuning.finetunejob import (
    Checkpoints,
    FineTuneJobSpec,
    LoraSettings,
    Method,
    TrainingData,
    TrainingSettings,
)
from lorapool_api.tuning.finetunejob_status import (
    CheckpointStatus,
    DataStatus,
    MetricsStatus,
    ProgressStatus,
    QueueStatus,
    ResolvedStatus,
    TuningUsage,
)
from lorapool_api.tuning.states import JobState, RunState

TRAINER_PORT = 8000

ROUTE_TRAINER = "/v1/trainer"
"""`?after=SEQ&boot=ID&wait=S`, answered as `GET /v1/runtime` is: when seq > SEQ, at the latest after S seconds."""
ROUTE_JOB = "/v1/jobs/{uid}"

MAX_CRASHES = 3
"""A job is `Poisoned` when a trainer's process ended this often while it computed the job; before that, twice, it is
trained alone."""


class InitialAdapter(ApiModel):
    """The adapter whose training is continued."""

    source: SourceRef
    """Where its files are."""
    digest: str = Field(pattern=DIGEST_PATTERN)
    """Digest of its files; other content is refused."""


class TrainerJob(ApiModel):
    """Body of `PUT /v1/jobs/{uid}`: everything that a trainer needs to train the job, in any pod, from any point."""

    display: str = Field(max_length=160)
    """`namespace/name`, for logs and metrics. The namespace decides with whose rights sources are read."""
    created_unix_s: float
    """When the job was created: of equal priority, the older one is admitted first."""
    run: RunState = RunState.RUN
    """Paused: a checkpoint is written and the memory is freed. Cancelled: it ends."""
    priority: int = Field(default=50, ge=0, le=100)
    """Its share of the computation."""
    store: StoreAccess | None = None
    """How the files below, and no others, are reached. It expires; the operator sends the job again well before. None:
    the trainer has rights of its own, as on a laptop."""
    workspace: str = Field(max_length=512)
    """`store://<namespace>/jobs/<uid>`: folder of checkpoints, events, report.json, and result_files."""
    output: str = Field(max_length=512)
    """`store://<namespace>/adapters/<uid>`: folder of the adapter's files, the source of its LoraAdapter."""
    method: Method = Method.SUPERVISED
    """How it learns."""
    init_from: InitialAdapter | None = None
    """None: it starts as the base."""
    data: TrainingData
    """What it learns from."""
    lora: LoraSettings
    """Rank and alpha are numbers here, unless `init_from` decides them: then they are what the job asks for, if
    anything, and other values than the adapter's are refused."""
    training: TrainingSettings
    """Epochs, batch size, learning rate and the longest example are numbers here. Without `numerics` the trainer
    decides by its device."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """How often they are written, and how many are kept."""
    crashes: int = Field(default=0, ge=0)
    """What the operator knows of `TuningUsage.crashes`; the larger of the two numbers counts."""

    @property
    def namespace(self) -> str:
        """The job's namespace, its tenant."""
        return self.display.partition("/")[0]

    @property
    def checkpoint_every_s(self) -> float:
        """Seconds between two checkpoints."""
        return duration_s(self.checkpoints.every)


class JobResult(ApiModel):
    """The files of a trained adapter."""

    uri: str = Field(max_length=512)
    """The source that serves them, as in `LoraAdapter.spec.source.uri`."""
    digest: str = Field(pattern=DIGEST_PATTERN)
    """`artifact_digest` of the folder."""
    size_bytes: int = Field(ge=0)
    """Their size."""


class JobFailureDetail(ErrorDetail):
    """Why a job does not go on; `reason` is a `JobFailure` value."""

    line: int | None = Field(default=None, ge=1)
    """Line of the data set that is refused."""


class JobReport(ApiModel):
    """One registered job of a trainer."""

    uid: str
    """Uid of the FineTuneJob."""
    display: str
    """`namespace/name`."""
    run: RunState
    """As the last PUT said; the operator repeats a PUT that is not reflected here."""
    priority: int
    """As the last PUT said."""
    state: JobState
    """Succeeded: trained, evaluated and written; whether it becomes a model is decided by the operator."""
    since_unix_s: float
    """When this process took the job."""
    shared_with: int = 0
    """Other jobs in training on the same copy of the base."""
    queue: QueueStatus | None = None
    """Why it waits; absent while it does not."""
    data: DataStatus | None = None
    """Absent until the data was read."""
    resolved: ResolvedStatus | None = None
    """Absent until the job was admitted."""
    progress: ProgressStatus | None = None
    """Absent before its first step."""
    metrics: MetricsStatus | None = None
    """Absent before its first evaluation or step."""
    checkpoints: list[CheckpointStatus] = Field(default_factory=list, max_length=16)
    """The kept ones, the newest last."""
    result: JobResult | None = None
    """Present once the adapter was written; also for a job that failed afterwards."""
    usage: TuningUsage = Field(default_factory=TuningUsage)
    """Totals of the job; they continue in the next trainer."""
    failure: JobFailureDetail | None = None
    """Why it failed, or, with `retry_at_unix_s`, why it waits."""


class TrainerBase(ApiModel):
    """The base that a trainer has in memory."""

    digest: str | None = None
    """Digest of its files."""
    dtype: str
    """Type of the weights."""
    device: str
    """cpu or cuda, and which one."""


class TrainerMemory(ApiModel):
    """Memory of the device that trains, in bytes."""

    limit_bytes: int = Field(ge=0)
    """What the process may use."""
    base_bytes: int = Field(default=0, ge=0)
    """The base's weights."""
    jobs_bytes: int = Field(default=0, ge=0)
    """Adapters, gradients and optimiser states of the admitted jobs."""
    activation_bytes: int = Field(default=0, ge=0)
    """Largest use by one cycle."""


class TrainerSnapshot(ApiModel):
    """Response of `GET /v1/trainer`. It always has all registered jobs."""

    seq: int
    """Increases with every change."""
    boot_id: str
    """Identifier of the process."""
    started_unix_s: float
    """Start of the process."""
    now_unix_s: float
    """The trainer's clock when it sent this; all times here are of that clock."""
    trainer_version: str = Field(max_length=64)
    """Release of Lorapool, for the lineage of adapters."""
    ready: bool
    """Whether the base is loaded."""
    draining: bool = False
    """Whether the process is about to end; it takes no more jobs."""
    base: TrainerBase | None = None
    """Absent until the base is loaded."""
    startup: StartupReport | None = None
    """How far the start is; absent once the base is loaded."""
    memory: TrainerMemory | None = None
    """Absent until the base is loaded."""
    busy_seconds: float = 0.0
    """Time in cycles since the start of the process, which the jobs' `trainer_seconds` divide up."""
    idle_since_unix_s: float | None = None
    """Since when no registered job could be trained; absent while one can."""
    jobs: list[JobReport] = Field(default_factory=list)
    """All registered jobs, ended ones included until they are deleted."""

    def job(self, uid: str) -> JobReport | None:
        """The report of one job, or None when it is not registered."""
        return next((item for item in self.jobs if item.uid == uid), None)


class PutJobAnswer(ApiModel):
    """Response of `PUT /v1/jobs/{uid}`."""

    boot_id: str
    """Identifier of the process."""
    job: JobReport
    """Its state after the registration."""


def resolved_lora(spec: FineTuneJobSpec, base: BaseModelSpec) -> LoraSettings:
    """The job's LoRA settings with the base's defaults for what the spec leaves out."""
    rank = spec.lora.rank or base.fine_tuning.defaults.rank
    return spec.lora.model_copy(update={"rank": rank, "alpha": spec.lora.alpha or 2 * rank})


def resolved_training(spec: FineTuneJobSpec, base: BaseModelSpec) -> TrainingSettings:
    """The job's training settings with defaults for what the spec leaves out, but for `numerics`."""
    given = spec.training
    return given.model_copy(
        update={
            "epochs": given.epochs or DEFAULT_EPOCHS,
            "batch_size": given.batch_size or DEFAULT_BATCH_SIZE,
            "learning_rate": given.learning_rate or base.fine_tuning.defaults.learning_rate,
            "max_tokens": given.max_tokens or base.max_model_len,
        }
    )


DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
