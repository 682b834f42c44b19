"""The engine's settings of a job. Rank, alpha and layers of one that continues an adapter are the adapter's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lorapool_api.tuning.finetunejob import ALL_LINEAR, LoraSettings
from lorapool_trainer.engine import JobSettings, Schedule
from lorapool_trainer.jobs.initial import InitialAdapter, InitialAdapterError
from lorapool_trainer.jobs.order import JobOrder


def engine_settings(order: JobOrder) -> JobSettings:
    """The settings as the engine takes them. Raises ValueError for a number out of its range, or a missing one."""
    lora, training = order.lora, order.training
    if not (lora.rank and training.epochs and training.batch_size and training.learning_rate):
        raise ValueError("rank, epochs, batchSize and learningRate must be resolved to numbers")
    return JobSettings(
        rank=lora.rank,
        alpha=float(lora.alpha or 2 * lora.rank),
        dropout=float(lora.dropout),
        target_modules=_targets(lora),
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch_size=training.batch_size,
        learning_rate=float(training.learning_rate),
        schedule=Schedule(training.schedule.value),
        warmup=float(training.warmup),
        weight_decay=float(training.weight_decay),
        max_grad_norm=float(training.max_grad_norm),
        seed=training.seed,
    )


def continued_settings(
    order: JobOrder, initial: InitialAdapter, targets: Callable[[JobSettings], tuple[str, ...]]
) -> JobSettings:
    """The job's settings with the adapter's rank, alpha and layers. `targets` finds the layers of settings.

    Raises InitialAdapterError where `lora` asks for others, and what `targets` and `engine_settings` raise.
    """
    asked = order.lora
    for name, given, own in (("rank", asked.rank, initial.rank), ("alpha", asked.alpha, initial.alpha)):
        if given is not None and given != own:
            raise _conflict(name, f"{given}", f"{own:g}")
    plain = engine_settings(replace(order, lora=asked.model_copy(update={"rank": initial.rank})))
    settings = replace(plain, alpha=initial.alpha, target_modules=initial.modules)
    if _names_layers(asked) and set(targets(plain)) != set(targets(settings)):
        names = ", ".join(sorted({module.rpartition(".")[2] for module in initial.modules}))
        raise _conflict("targetModules", ", ".join(asked.target_modules), f"{len(initial.modules)} layers {names}")
    return settings


def _names_layers(lora: LoraSettings) -> bool:
    """all-linear is the default, and so no wish."""
    return _targets(lora) != ALL_LINEAR


def _conflict(name: str, given: str, own: str) -> InitialAdapterError:
    return InitialAdapterError(
        f"spec.lora.{name} is {given}, but the adapter of spec.initFrom has {own}; leave spec.lora.{name} out"
    )


def _targets(lora: LoraSettings) -> tuple[str, ...] | str:
    """As the engine takes them."""
    return ALL_LINEAR if ALL_LINEAR in lora.target_modules else tuple(lora.target_modules)
