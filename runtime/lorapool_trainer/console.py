"""Progress on a terminal: one line per job whenever it has something new to say, at most every few seconds."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from lorapool_api.tuning.finetunejob_status import MetricsStatus, ProgressStatus
from lorapool_api.tuning.states import JobState
from lorapool_api.tuning.trainer_protocol import JobReport

INTERVAL_S = 5.0


class Console:
    """Decides which lines are due. `now_s` and `now_unix_s` come from the caller's clocks."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._shown: dict[str, tuple[JobState, int]] = {}
        self._shown_s = float("-inf")

    def lines(self, reports: Iterable[JobReport], now_s: float, now_unix_s: float) -> list[str]:
        """A line of each job whose state changed, and of each that made steps since the last lines, when it is time."""
        due = now_s - self._shown_s >= self._interval_s
        found = []
        for report in reports:
            state, step = self._shown.get(report.uid, (JobState.QUEUED, 0))
            own = report.progress.step if report.progress else 0
            changed = report.state is not state and (report.state.ended or state is JobState.QUEUED)
            if changed or (due and own != step):
                self._shown[report.uid] = report.state, own
                found.append(line(report, now_unix_s))
        self._shown_s = now_s if due else self._shown_s
        return found


def line(report: JobReport, now_unix_s: float) -> str:
    """Name, then what is known: steps, losses, tokens per second, time left; at the end why it failed."""
    name = report.display.partition("/")[2]
    if report.failure is not None:
        return f"{name}  {report.state.value}: {report.failure.reason}: {report.failure.message}"
    parts = [name, report.state.value.lower(), *_progress(report.progress, now_unix_s), *_losses(report.metrics)]
    return "  ".join(parts)


def _progress(progress: ProgressStatus | None, now_unix_s: float) -> list[str]:
    if progress is None:
        return []
    parts = [f"step {progress.steps}"]
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.estimated_finish:
        left_s = datetime.fromisoformat(progress.estimated_finish).timestamp() - now_unix_s
        parts.append(f"{_duration(max(0.0, left_s))} left")
    return parts


def _losses(metrics: MetricsStatus | None) -> list[str]:
    if metrics is None:
        return []
    named = [("loss", metrics.train_loss), ("valid", metrics.valid_loss), ("base", metrics.base_valid_loss)]
    return [f"{name} {value:.3f}" for name, value in named if value is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
