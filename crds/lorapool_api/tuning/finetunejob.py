"""The FineTuneJob object: one fine-tune of a base that is to be trained, and what happens with the result.

Jobs of one base train together in one trainer. What is trained never changes after creation; `run` and `priority` may.
Fractions are written as text, such as "1e-3", so that every client reads the same number. A setting that is left out
is decided by the base's defaults; `status.resolved` has the number in use.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from lorapool_api.basemodel import rule, rules
from lorapool_api.common import DECIMAL_PATTERN, DIGEST_PATTERN, ApiModel, Duration
from lorapool_api.loraadapter import BaseModelRef
from lorapool_api.tuning.states import RunState

KIND = "FineTuneJob"
PLURAL = "finetunejobs"

NAME_MAX = 63
MIN_EXAMPLES = 10
"""A data set with fewer is refused, as OpenAI does."""

ANNOTATION_METADATA = "lorapool.dev/metadata"
"""On a FineTuneJob: the `metadata` of the API's request, as JSON."""
ANNOTATION_JOB = "lorapool.dev/tuned-by"
"""On a LoraAdapter: namespace, name and uid of the FineTuneJob that it came from, as `namespace/name@uid`."""
ANNOTATION_LINEAGE = "lorapool.dev/lineage"
"""On a LoraAdapter: JSON with base digest, data digests, seed, resolved settings and trainer version."""
FINALIZER = "lorapool.dev/tuning-data"
"""On a FineTuneJob: its deletion waits until the checkpoints are deleted."""

Decimal = Annotated[str, Field(min_length=1, max_length=24, pattern=DECIMAL_PATTERN)]
DATA_URI_PATTERN = r"^store://[a-z0-9-]{1,63}/[A-Za-z0-9._/-]{1,400}$"
DataUri = Annotated[str, Field(min_length=9, max_length=512, pattern=DATA_URI_PATTERN)]
TargetModule = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
ALL_LINEAR = "all-linear"
"""As in peft: every linear layer inside the model, without the output layer."""


class Method(StrEnum):
    """How a job learns from its data."""

    SUPERVISED = "Supervised"


class DataFormat(StrEnum):
    """How the lines of a data set are written. Auto: as its first line is."""

    AUTO = "Auto"
    CHAT = "Chat"
    PROMPT_COMPLETION = "PromptCompletion"


class LossOn(StrEnum):
    """Which assistant messages are learned."""

    ASSISTANT = "Assistant"
    """All whose weight is not 0."""
    LAST_ASSISTANT = "LastAssistant"
    """The last one of each example."""


class Schedule(StrEnum):
    """How the learning rate changes after the warm-up."""

    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class Numerics(StrEnum):
    """Whether neighbours may change a job's rounding.

    Exact: the result is bit for bit that of training alone. Fast: gradients agree to 1e-5, and steps are larger.
    """

    EXACT = "Exact"
    FAST = "Fast"


class PromotionPolicy(StrEnum):
    """When a trained adapter becomes a model.

    Gated: once its validation loss is low enough. Always: in any case. Never: its files are kept, and no more.
    """

    GATED = "Gated"
    ALWAYS = "Always"
    NEVER = "Never"


class DataFile(ApiModel):
    """One file of examples, JSON lines as OpenAI defines them."""

    uri: DataUri = Field(
        description="Location of the file in the release's store: store://<namespace>/files/<id>, with the job's own "
        "namespace."
    )
    digest: str | None = Field(
        default=None,
        max_length=71,
        pattern=DIGEST_PATTERN,
        description="Expected sha256 of the file; other content is refused. Without it, the first one that is read is "
        "recorded in the status and enforced.",
    )
    format: DataFormat = DataFormat.AUTO
    """How its lines are written. Auto: as the first line is."""


class TrainingData(ApiModel):
    """What the job learns from, and what it is measured with."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.validation) || !has(self.validationFraction)",
                "data takes validation or validationFraction, not both",
            ),
            rule(
                "!has(self.validationFraction) || double(self.validationFraction) < 0.9",
                "data.validationFraction must be below 0.9",
            ),
        )
    )

    training: DataFile
    validation: DataFile | None = None
    """A file of its own to measure with."""
    validation_fraction: Decimal | None = Field(
        default=None,
        description='Share of the training examples, such as "0.1", that is measured with and not trained on. The '
        "seed decides which. Without it and without a file of its own, nothing is measured.",
    )
    loss_on: LossOn = LossOn.ASSISTANT
    """Which assistant messages are learned. Prompts never are."""


class LoraSettings(ApiModel):
    """The shape of the adapter."""

    model_config = ConfigDict(
        json_schema_extra=rules(rule("double(self.dropout) < 1.0", "lora.dropout must be below 1"))
    )

    rank: int | None = Field(
        default=None, ge=1, le=256, description="Rank of the matrices. Default: the base's fineTuning.defaults.rank."
    )
    alpha: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Scale: what the adapter adds is multiplied by alpha / rank. Default: twice the rank.",
    )
    dropout: Decimal = "0"
    """Probability with which an input of the adapter is left out in training."""
    target_modules: list[TargetModule] = Field(
        default=[ALL_LINEAR],
        min_length=1,
        max_length=64,
        description="Last parts of the names of the layers that are changed, such as q_proj, or all-linear.",
    )


class EarlyStopping(ApiModel):
    """Ends training when the validation loss does not fall any more; the best checkpoint is the result."""

    patience: int = Field(default=3, ge=1, le=1000, description="Evaluations without improvement before the end.")
    min_delta: Decimal = Field(default="0.001", description="A smaller fall is no improvement.")


class TrainingSettings(ApiModel):
    """How the job learns."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.learningRate) || double(self.learningRate) > 0.0", "training.learningRate must be above 0"),
            rule("double(self.warmup) < 1.0", "training.warmup is a share of the steps and must be below 1"),
            rule("double(self.maxGradNorm) > 0.0", "training.maxGradNorm must be above 0"),
        )
    )

    epochs: int | None = Field(default=None, ge=1, le=50, description="Passes over the training examples. Default: 3.")
    max_steps: int | None = Field(
        default=None, ge=1, le=1000000, description="Optimiser steps after which training ends, whatever epochs says."
    )
    batch_size: int | None = Field(
        default=None, ge=1, le=256, description="Examples of one optimiser step. Default: 8."
    )
    learning_rate: Decimal | None = Field(
        default=None, description="Largest learning rate. Default: the base's fineTuning.defaults.learningRate."
    )
    schedule: Schedule = Schedule.COSINE
    """How the learning rate changes after the warm-up."""
    warmup: Decimal = Field(default="0.06", description="Share of the steps in which the learning rate rises.")
    weight_decay: Decimal = "0.01"
    """Of AdamW."""
    max_grad_norm: Decimal = "1"
    """Gradients of a step with a larger norm are scaled down to it."""
    max_tokens: int | None = Field(
        default=None,
        ge=16,
        le=1048576,
        description="Tokens of the longest example; a longer one is refused, never cut. Default: the base's "
        "maxModelLen.",
    )
    seed: int = Field(default=7, ge=0, le=4294967295, description="Decides initial weights, order and split.")
    numerics: Numerics | None = Field(
        default=None,
        description="Exact: the result is bit for bit that of training alone. Fast: larger steps, whose gradients "
        "agree to 1e-5. Default: Exact on a CPU, Fast on a GPU.",
    )
    early_stopping: EarlyStopping | None = None
    """When training ends before its last step. Absent: never."""


class Checkpoints(ApiModel):
    """How much work an ended trainer can cost."""

    every: Duration = Field(default="10m", description="Time between two checkpoints.")
    keep: int = Field(default=3, ge=1, le=16, description="Checkpoints that are kept; older ones are deleted.")


class Promotion(ApiModel):
    """When the trained adapter becomes a model that clients can use."""

    policy: PromotionPolicy = PromotionPolicy.GATED
    """Gated: once its validation loss is low enough. Always, or Never."""
    min_improvement: Decimal = Field(
        default="0", description="Gated: the validation loss must be lower than the base's own by more than this."
    )
    max_valid_loss: Decimal | None = Field(
        default=None, description="Gated: the validation loss must not be higher than this."
    )


class Output(ApiModel):
    """Where the result goes."""

    adapter_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Name of the LoraAdapter, in the job's namespace. Default: the job's own name.",
    )
    suffix: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Part of the model name ft:<base>:<namespace>:<suffix>:<id> that the job's owner chooses.",
    )


class InitFrom(ApiModel):
    """A LoraAdapter of the job's namespace whose training is continued: its rank, alpha and targets are used."""

    name: str = Field(
        min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Name of the LoraAdapter."
    )


def _immutable(field: str) -> dict[str, str]:
    return rule(
        f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        f"{field} is immutable: create another FineTuneJob",
    )


class FineTuneJobSpec(ApiModel):
    """The desired state of a FineTuneJob."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *map(
                _immutable,
                (
                    "baseModelRef",
                    "initFrom",
                    "method",
                    "data",
                    "lora",
                    "training",
                    "checkpoints",
                    "promotion",
                    "output",
                ),
            ),
            rule(
                "oldSelf.run != 'Cancelled' || self.run == 'Cancelled'",
                "run: Cancelled is final: create another FineTuneJob",
            ),
            rule(
                "self.promotion.policy != 'Gated' || has(self.data.validation) || has(self.data.validationFraction)",
                "promotion.policy Gated needs data.validation or data.validationFraction; else choose Always or Never",
            ),
        )
    )

    base_model_ref: BaseModelRef = Field(
        description="The base that is tuned. It must set fineTuning.enabled, and list the job's namespace if that is "
        "another one."
    )
    init_from: InitFrom | None = None
    method: Method = Method.SUPERVISED
    data: TrainingData
    lora: LoraSettings = Field(default_factory=LoraSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    promotion: Promotion = Field(default_factory=Promotion)
    output: Output = Field(default_factory=Output)
    priority: int = Field(
        default=50, ge=0, le=100, description="Share of the trainer: a job of 100 computes twice as often as one of 50."
    )
    run: RunState = Field(
        default=RunState.RUN, description="Run, Paused or Cancelled. Cancelled is final and keeps no model."
    )
    active_deadline: Duration | None = Field(
        default=None, description="The job fails if it has not ended this long after its training began."
    )
    ttl_after_finished: Duration | None = Field(
        default=None,
        description="The object and its checkpoints are deleted this long after the job's end. Its model stays. "
        "Default: never.",
    )


def model_alias(*, base: str, namespace: str, suffix: str | None, job_uid: str) -> str:
    """The model name `ft:<base>:<namespace>:<suffix>:<id>` of a trained adapter, at most 128 characters.

    `id` is the first part of the job's uid. Suffix, then namespace are shortened where the whole would be longer.
    """
    identifier = job_uid.partition("-")[0][:8]
    room = 128 - len(f"ft:{base}:::{identifier}")
    kept = namespace[: max(1, room - min(len(suffix or ""), 16))]
    return f"ft:{base}:{kept}:{(suffix or '')[: room - len(kept)]}:{identifier}"
