"""The observed state of a FineTuneJob. Trainers report the parts of it that they know in the same form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorapool_api.common import ApiModel, Condition

_TIME = {"format": "date-time"}
Time = Annotated[str, Field(max_length=64, json_schema_extra=_TIME)]


class DataStatus(ApiModel):
    """What the data set has, as the trainer tokenised it."""

    digest: str | None = Field(default=None, max_length=80, description="sha256 of the training file.")
    validation_digest: str | None = Field(default=None, max_length=80, description="sha256 of the validation file.")
    examples: int = 0
    """Examples that are trained on."""
    train_tokens: int = 0
    """Their tokens, prompts included."""
    counted_tokens: int = 0
    """Those of them that the loss counts."""
    validation_examples: int = 0
    """Examples that are measured with."""


class InitialStatus(ApiModel):
    """The adapter of `spec.initFrom` as it was when training began. What becomes of the LoraAdapter changes nothing."""

    uri: str = Field(max_length=512, description="Where its files are.")
    digest: str = Field(max_length=80, description="Digest of its files; the job fails if they have another one.")


class ResolvedStatus(ApiModel):
    """The settings in use, those that the spec leaves out included."""

    epochs: int | None = None
    """Passes over the training examples."""
    batch_size: int | None = None
    """Examples of one optimiser step."""
    learning_rate: float | None = None
    """Largest learning rate."""
    rank: int | None = None
    """Rank of the matrices."""
    alpha: int | None = None
    """Numerator of the adapter's scale."""
    max_tokens: int | None = None
    """Tokens of the longest example that is accepted."""
    target_modules: list[Annotated[str, Field(max_length=128)]] = Field(
        default_factory=list, max_length=64, description="Last parts of the names of the layers that are changed."
    )
    seed: int | None = None
    """Decides initial weights, order and split."""
    numerics: str | None = Field(default=None, max_length=16, description="Exact or Fast.")


class ProgressStatus(ApiModel):
    """How far training is."""

    step: int = 0
    """Optimiser steps that are done."""
    total_steps: int = 0
    """Steps until the end, unless it stops early."""
    epoch: float = 0.0
    """Passes over the training examples so far."""
    trained_tokens: int = 0
    """Tokens of these steps, prompts included."""
    percent: int = Field(default=0, ge=0, le=100, description="Share of the steps that is done.")
    steps: str | None = Field(default=None, max_length=32, description='Steps as "n/m", for the PROGRESS column.')
    tokens_per_second: float | None = None
    """Present rate of this job alone."""
    estimated_finish: Time | None = None
    """When training ends at this rate."""


class MetricsStatus(ApiModel):
    """What was measured. Losses are means over counted tokens, in nats."""

    train_loss: float | None = None
    """Of the last steps."""
    valid_loss: float | None = None
    """Of the last evaluation; once the job has ended, of its result."""
    base_valid_loss: float | None = None
    """Of the base without the adapter, measured before the first step."""
    best_valid_loss: float | None = None
    """Lowest so far."""
    best_step: int | None = None
    """The step of the lowest one."""
    valid_token_accuracy: float | None = None
    """Share of counted validation tokens that are the most probable ones."""


class CheckpointStatus(ApiModel):
    """A saved state that training can be continued from."""

    step: int = Field(ge=0, description="Optimiser steps before it.")
    digest: str = Field(max_length=80, description="sha256 of its files.")
    uri: str = Field(max_length=512, description="Where it is stored.")
    train_loss: float | None = None
    """Of the last steps before it."""
    valid_loss: float | None = None
    """Of the evaluation at this step, where there was one."""
    at: Time | None = None
    """When it was written."""


class TuningUsage(ApiModel):
    """What the job has used, in all trainers that it ran in."""

    trained_tokens: int = 0
    """Tokens that were computed for it, those of a lost trainer since the last checkpoint included where known."""
    trainer_seconds: float = 0.0
    """Its share of the trainers' busy time, split by tokens in each cycle."""
    restarts: int = 0
    """How often training continued from a checkpoint."""
    skipped_steps: int = 0
    """Steps without effect, because loss or gradient was not finite."""
    crashes: int = 0
    """How often a trainer's process ended while it computed this job. The third time the job is `Poisoned`."""


class TrainerStatus(ApiModel):
    """The trainer that has the job now."""

    pod: str = Field(max_length=253, description="Name of the trainer's pod.")
    boot_id: str = Field(alias="bootID", max_length=64, description="Identifier of the trainer's process.")
    base_digest: str | None = Field(default=None, max_length=80, description="Digest of the base's files in it.")
    shared_with: int = Field(default=0, ge=0, description="Other jobs that train on the same copy of the base now.")
    since: Time | None = None
    """When this process took the job."""


class QueueStatus(ApiModel):
    """Why the job waits."""

    position: int | None = Field(default=None, ge=1, description="1 is the next to start.")
    reason: str = Field(max_length=64, description="One of the documented reasons.")


class ResultStatus(ApiModel):
    """What the job made."""

    digest: str | None = Field(default=None, max_length=80, description="Digest of the adapter's files.")
    uri: str | None = Field(default=None, max_length=512, description="Where they are stored.")
    size_bytes: int | None = None
    """Their size."""
    adapter: str | None = Field(default=None, max_length=63, description="Name of the LoraAdapter.")
    model: str | None = Field(default=None, max_length=128, description="Model name for clients.")


class JobFailureStatus(ApiModel):
    """Why the job does not go on."""

    reason: str = Field(max_length=64, description="One of the documented failure reasons.")
    message: str = Field(max_length=1024, description="What is wrong and the remedy.")
    line: int | None = Field(default=None, ge=1, description="Line of the data set that is refused.")
    attempts: int = 0
    """Failed attempts so far."""
    retry_at: Time | None = None
    """Time of the next attempt. Absent once the job has failed for good."""


class FineTuneJobStatus(ApiModel):
    """The observed state of a FineTuneJob. Progress is written every 10 seconds at most."""

    observed_generation: int | None = None
    """The metadata.generation that this status describes."""
    state: str | None = Field(
        default=None,
        max_length=32,
        description="Validating, Queued, Training, Paused, Evaluating, Publishing, Succeeded, Failed or Cancelled.",
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="DataValid, Admitted, Progressing, Evaluated, Promoted and Completed.",
    )
    started_at: Time | None = None
    """When training began for the first time."""
    finished_at: Time | None = None
    """When the job ended."""
    data: DataStatus | None = None
    initial: InitialStatus | None = None
    resolved: ResolvedStatus | None = None
    progress: ProgressStatus | None = None
    metrics: MetricsStatus | None = None
    trainer: TrainerStatus | None = None
    queue: QueueStatus | None = None
    checkpoints: list[CheckpointStatus] = Field(
        default_factory=list, max_length=16, description="The saved states, the newest last."
    )
    result: ResultStatus | None = None
    usage: TuningUsage | None = None
    failure: JobFailureStatus | None = None
