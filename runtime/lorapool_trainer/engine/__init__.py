"""The numeric heart of the trainer: one frozen base, and the LoRA jobs that are trained on it together.

What decides or computes a job's numbers belongs here; data formats, files, HTTP, time and Kubernetes do not.
"""

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_trainer.engine.engine import Engine
from lorapool_trainer.engine.memory import Admission, MemoryFigures
from lorapool_trainer.engine.plan import Offer, Take, plan_cycle
from lorapool_trainer.engine.reports import CycleReport, Evaluation, JobState, StepReport
from lorapool_trainer.engine.settings import (
    ALL_LINEAR,
    Example,
    JobSettings,
    Numerics,
    Schedule,
    learning_rate,
    total_steps,
)
from lorapool_trainer.engine.targets import TargetError

__all__ = [
    "ALL_LINEAR",
    "Admission",
    "CycleReport",
    "Engine",
    "Evaluation",
    "Example",
    "JobSettings",
    "JobState",
    "MemoryFigures",
    "Numerics",
    "Offer",
    "Schedule",
    "StepReport",
    "Take",
    "TargetError",
    "UnsupportedBaseError",
    "learning_rate",
    "plan_cycle",
    "total_steps",
]
