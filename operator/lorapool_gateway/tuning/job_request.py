"""`POST /v1/fine_tuning/jobs` parsed into what a job needs. Pure.

Every member is checked here, with the `param` that is wrong; whether the files and the model exist is not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorapool_api.openai import InvalidRequestError
from lorapool_api.tuning.finetunejob import LossOn, Numerics, PromotionPolicy, Schedule

MIN_MULTIPLIER, MAX_MULTIPLIER = 1e-6, 10_000.0
MIN_DECIMAL = 1e-12
"""The least number above 0: what objects write with an exponent of two digits."""
MAX_METADATA = 16
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TARGET = r"^[A-Za-z0-9_.-]{1,128}$"

Auto = Literal["auto"]


def _decimal(value: object) -> object:
    """A number, or one as text, as the text that the object has."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(number) or not (number == 0 or MIN_DECIMAL <= number < 1e9):
        raise ValueError(f"must be 0 or a number from {MIN_DECIMAL:g} to 1e9")
    return f"{number:.12g}"


DecimalText = Annotated[str, BeforeValidator(_decimal)]


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hyperparameters(_Given):
    """OpenAI's, each a number or auto."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: (
        Annotated[float, Field(ge=MIN_MULTIPLIER, le=MAX_MULTIPLIER, allow_inf_nan=False)] | Auto
    ) = "auto"


class Supervised(_Given):
    hyperparameters: Hyperparameters | None = None


class Method(_Given):
    type: Literal["supervised"]
    supervised: Supervised | None = None


class Extras(_Given):
    """The member `lorapool`: what OpenAI's API has no names for."""

    rank: Annotated[int, Field(ge=1, le=256)] | None = None
    alpha: Annotated[int, Field(ge=1, le=1024)] | None = None
    dropout: DecimalText | None = None
    target_modules: (
        Annotated[list[Annotated[str, Field(pattern=_TARGET)]], Field(min_length=1, max_length=64)] | None
    ) = None
    learning_rate: DecimalText | None = None
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_tokens: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    schedule: Annotated[Schedule, Field(strict=False)] | None = None
    warmup: DecimalText | None = None
    weight_decay: DecimalText | None = None
    numerics: Annotated[Numerics, Field(strict=False)] | None = None
    loss_on: Annotated[LossOn, Field(strict=False)] | None = None
    validation_fraction: DecimalText | None = None
    promotion: Annotated[PromotionPolicy, Field(strict=False)] | None = None
    priority: Annotated[int, Field(ge=0, le=100)] | None = None


class JobRequest(_Given):
    """The body, as the client sent it."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: Annotated[str, Field(min_length=1, max_length=128)]
    validation_file: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    suffix: Annotated[str, Field(pattern=f"^{_SUFFIX.pattern}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    lorapool: Extras = Extras()

    @property
    def chosen(self) -> Hyperparameters:
        """The hyper-parameters of `method`, else the older member."""
        supervised = self.method.supervised if self.method is not None else None
        nested = supervised.hyperparameters if supervised is not None else None
        return nested or self.hyperparameters or Hyperparameters()


@dataclass(frozen=True, slots=True)
class _Words:
    """What is wrong with a member, where pydantic's own words do not say what to do."""

    sentences: Mapping[str, str]

    def of(self, param: str, message: str) -> str:
        return self.sentences.get(param) or f"{param}: {message.removeprefix('Value error, ')}."


_WORDS = _Words(
    {
        "method.type": "method.type must be supervised; dpo and reinforcement are not trained here.",
        "suffix": "suffix must be 1 to 64 letters, digits and ._-, and begin with a letter or a digit.",
        "integrations": "integrations are not supported; follow the events of the job.",
        "metadata": f"metadata may have {MAX_METADATA} members with names of 64 and texts of 512 characters.",
    }
)


def parse_job(body: bytes) -> JobRequest:
    """Raises InvalidRequestError with the member that is wrong."""
    try:
        value = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise InvalidRequestError("The body is not JSON.", code="invalid_body") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_body")
    try:
        found = JobRequest.model_validate(value)
    except ValidationError as error:
        raise _wrong(error) from None
    _check_agreement(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice")
    return found


def _wrong(error: ValidationError) -> InvalidRequestError:
    item = error.errors(include_url=False, include_input=False)[0]
    names: list[str] = []
    for part in item["loc"]:
        if (
            not isinstance(part, str)
            or part in _BRANCHES
            or part.startswith(("constrained", "function", "literal", "list[", "dict["))
        ):
            break
        names.append(part)
    param = "metadata" if names[:1] == ["metadata"] else ".".join(names)
    if item["type"] == "missing":
        return InvalidRequestError(f"{param} is required.", param=param, code="missing_required_parameter")
    if item["type"] == "extra_forbidden":
        return InvalidRequestError(f"There is no parameter {param}.", param=param, code="unknown_parameter")
    return InvalidRequestError(
        _BOUNDS.get(param.rpartition(".")[2]) or _WORDS.of(param, item["msg"]), param=param, code="invalid_value"
    )


_BRANCHES = frozenset({"int", "float", "str", "bool"})
_BOUNDS = {
    "n_epochs": "n_epochs must be auto or a number from 1 to 50.",
    "batch_size": "batch_size must be auto or a number from 1 to 256.",
    "learning_rate_multiplier": f"learning_rate_multiplier must be auto or above 0, at most {MAX_MULTIPLIER:g}.",
}


def _check_agreement(request: JobRequest) -> None:
    """Raises InvalidRequestError where two members contradict each other."""
    nested = request.method.supervised if request.method is not None else None
    if request.hyperparameters and nested and nested.hyperparameters not in (None, request.hyperparameters):
        raise InvalidRequestError(
            "hyperparameters and method.supervised.hyperparameters differ. Send the latter alone.",
            param="hyperparameters",
            code="invalid_value",
        )
    if request.validation_file == request.training_file:
        raise InvalidRequestError(
            "validation_file must be another file than training_file.", param="validation_file", code="invalid_value"
        )
    if request.validation_file and request.lorapool.validation_fraction:
        raise InvalidRequestError(
            "Send validation_file or lorapool.validation_fraction, not both.",
            param="lorapool.validation_fraction",
            code="invalid_value",
        )
