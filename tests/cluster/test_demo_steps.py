"""How the demo runs its steps: order, concurrency, failure, interrupt, and what it checks before it begins."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "hack"))

from demo import preflight  # noqa: E402  (hack is no installed package)
from demo.preflight import Machine, duration, problems, summary  # noqa: E402
from demo.questions import BillLine  # noqa: E402
from demo.report import bill_table  # noqa: E402
from demo.run import Demo, Options, plan  # noqa: E402
from demo.schedule import Step, StepError, check, ready, run_all  # noqa: E402
from demo.steps import Commands, Console, end, write_json  # noqa: E402


def nothing() -> None:
    pass


def ignore(step: str, line: str) -> None:
    pass


class Events:
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def started(self, step: Step) -> None:
        self.seen.append(f"+{step.name}")

    def done(self, step: Step, seconds: float) -> None:
        self.seen.append(f"-{step.name}")


def test_a_step_is_ready_when_all_that_it_needs_has_ended_and_in_the_given_order() -> None:
    steps = [Step("a", "", nothing), Step("b", "", nothing), Step("c", "", nothing, ("a", "b"))]
    assert [step.name for step in ready(steps, set(), set())] == ["a", "b"]
    assert [step.name for step in ready(steps, {"a", "b"}, {"a"})] == []
    assert [step.name for step in ready(steps, {"a", "b"}, {"a", "b"})] == ["c"]


@pytest.mark.parametrize(
    "steps",
    [
        [Step("a", "", nothing, ("b",)), Step("b", "", nothing, ("a",))],
        [Step("a", "", nothing, ("unknown",))],
        [Step("a", "", nothing), Step("a", "", nothing)],
    ],
)
def test_a_cycle_an_unknown_name_and_a_repeated_name_are_refused(steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="the step a must be unique"):
        check(steps)


def test_two_steps_run_at_once_and_a_third_waits() -> None:
    both, third = threading.Barrier(2, timeout=20), threading.Event()
    at_once: list[bool] = []

    def meet() -> None:
        both.wait()
        at_once.append(third.is_set())
        both.wait()

    events = Events()
    steps = [Step("a", "", meet), Step("b", "", meet), Step("c", "", third.set)]
    run_all(steps, at_most=2, reporter=events, stop=nothing)
    assert events.seen[:2] == ["+a", "+b"]
    assert events.seen[2] in ("-a", "-b")
    assert at_once == [False, False]
    assert third.is_set()


def test_a_failure_names_its_step_stops_the_others_and_starts_no_more() -> None:
    stopped = threading.Event()

    def fail() -> None:
        raise StepError("no disk")

    def wait_for_stop() -> None:
        assert stopped.wait(20)

    events = Events()
    steps = [Step("fails", "", fail), Step("waits", "", wait_for_stop), Step("later", "", nothing, ("fails",))]
    with pytest.raises(StepError, match="no disk") as raised:
        run_all(steps, at_most=2, reporter=events, stop=stopped.set)
    assert raised.value.step == "fails"
    assert "+later" not in events.seen


CHILD = """
import sys, time
from pathlib import Path
try:
    Path(sys.argv[1]).write_text("half")
    print("started", file=sys.stderr, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    Path(sys.argv[1]).unlink()
"""


def test_stop_lets_a_command_clean_up_and_refuses_another(tmp_path: Path) -> None:
    commands = Commands(tmp_path / "log")
    started = threading.Event()
    artifact = tmp_path / "artifact"

    def run() -> None:
        argv = [sys.executable, "-c", CHILD, artifact]
        commands.run(argv, remedy="", timeout_s=60, show=lambda line: started.set())

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert started.wait(20)
        assert artifact.exists()
        commands.stop()
        assert future.exception(20) is None  # it cleaned up and ended with 0
    assert not artifact.exists()
    with pytest.raises(StepError, match="not started"):
        run()


def test_what_does_not_end_when_it_is_asked_is_killed_with_its_children() -> None:
    ignoring = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    parent = f"{ignoring} child = subprocess.Popen([sys.executable, '-c', {ignoring + 'time.sleep(60)'!r}]); "
    parent += "print('both run', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "both run\n"
    end([process], grace_s=0.2)
    # The child holds the other end of the pipe, which is closed only once it is dead.
    assert select.select([process.stdout], [], [], 20)[0]
    assert process.stdout.read() == ""
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_failed_command_shows_its_last_lines_and_the_remedy(tmp_path: Path) -> None:
    script = "import sys; print('out'); print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(StepError) as raised:
        Commands(tmp_path / "log").run([sys.executable, "-c", script], remedy="do this", timeout_s=20)
    assert "ended with 3" in str(raised.value)
    assert "the reason" in str(raised.value)
    assert "do this" in str(raised.value)
    assert "the reason" in (tmp_path / "log").read_text()


def test_a_late_command_is_ended_and_called_late(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"took longer than 0 s"):
        Commands(tmp_path / "log").run(["sleep", "60"], remedy="", timeout_s=0.01)


def test_a_command_gets_its_standard_input(tmp_path: Path) -> None:
    script = "import sys; print(sys.stdin.read().upper())"
    assert Commands(tmp_path / "log").run([sys.executable, "-c", script], remedy="", timeout_s=20, stdin="a") == "A\n"


@pytest.mark.parametrize("context", [None, "mine"])
@pytest.mark.parametrize("train", [False, True])
def test_the_demos_steps_depend_only_on_earlier_ones(train: bool, context: str | None, tmp_path: Path) -> None:
    steps = plan(Demo(Options(context=context, train=train), Commands(tmp_path / "log"), ignore))
    check(steps)
    assert steps[-1].name == ("train" if train else "bill")


def test_while_the_programs_are_compiled_the_images_are_built(tmp_path: Path) -> None:
    steps = plan(Demo(Options(), Commands(tmp_path / "log"), ignore))
    first = {step.name for step in ready(steps, set(), set())}
    then = [step.name for step in ready(steps, first, first)]
    assert first == {"tools", "environment"}
    assert then[:2] == ["programs", "images"]


READY = Machine("linux", (3, 11), True, 80.0, 20.0, (), True, built=False, running=False)


def test_a_machine_that_has_all_is_accepted() -> None:
    assert problems(READY) == []


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"platform": "darwin"}, "needs Linux"),
        ({"python": (3, 10)}, "Python 3.11 is needed, this is 3.10"),
        ({"is_root": False}, "sudo -E make demo"),
        ({"disk_free": 24.0}, "25 GiB of disk are needed, 24 are free"),
        ({"memory_available": 2.0}, "6 GiB of memory are needed, 2.0 are available"),
        ({"missing_packages": ("runc",), "has_apt": False}, "no apt-get to install runc"),
    ],
)
def test_what_a_machine_lacks_is_named_with_a_remedy(changed: dict[str, object], text: str) -> None:
    (problem,) = problems(replace(READY, **changed))  # type: ignore[arg-type]  # one field each
    assert text in problem


def test_a_machine_that_has_built_all_needs_little_disk() -> None:
    assert problems(replace(READY, disk_free=4.0, built=True)) == []


def test_a_demo_that_is_up_needs_no_more_memory() -> None:
    assert problems(replace(READY, memory_available=1.0, running=True)) == []


def test_the_summary_tells_the_time_of_the_last_run() -> None:
    assert "took 8 min 20 s last time" in summary(READY, 500.0)
    assert "has not run on this machine before" in summary(READY, None)
    assert duration(59.6) == "1 min 0 s"
    assert duration(45.2) == "45 s"


def test_the_times_of_a_run_are_read_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPOOL_CACHE", str(tmp_path))
    assert preflight.last_times() == {}
    write_json(tmp_path / preflight.TIMES, {"total": 30.5})
    assert preflight.last_times() == {"total": 30.5}
    (tmp_path / preflight.TIMES).write_text("{")
    assert preflight.last_times() == {}


def test_the_console_shows_what_each_step_took_last_time(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.total, console.last = 2, {"images": 120.0}
    step = Step("images", "build the two images", nothing)
    console.started(step)
    console.done(step, 61.04)
    assert "[1/2] images: build the two images (120 s last time)" in capsys.readouterr().out
    assert console.seconds == {"images": 61.0}


def test_a_private_file_is_replaced_whole_and_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1}, mode=0o600)
    write_json(path, {"a": 2}, mode=0o600)
    assert json.loads(path.read_text()) == {"a": 2}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cluster.kernel import end_like_interrupt
from demo.schedule import Step, run_all
from demo.steps import Commands, Console
end_like_interrupt()
commands, console = Commands(Path(sys.argv[2], "log")), Console()
argv = [sys.executable, "-c", sys.argv[3], sys.argv[2] + "/artifact"]
show = lambda line: console.line("long", line)
step = Step("long", "", lambda: commands.run(argv, remedy="", timeout_s=60, show=show))
try:
    run_all([step], at_most=2, reporter=console, stop=commands.stop)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_running_step_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", INTERRUPTED, str(REPOSITORY / "hack"), str(tmp_path), CHILD]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "started" in line:
            os.kill(process.pid, number)
    assert process.wait(20) == 130
    assert not (tmp_path / "artifact").exists()
    process.stdout.close()


def test_the_bill_shows_each_model_and_the_exact_sum() -> None:
    lines = [BillLine(f"lorapool/{n}", n, 10 * n, n, 5, f"0.0000{n}1", "EUR") for n in (1, 2)]
    head, first, _, together = bill_table(lines).splitlines()
    assert head.split() == ["MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT", "AMOUNT", "EUR"]
    assert first.split() == ["lorapool/1", "1", "10", "1", "5", "0.000011"]
    assert together.split() == ["together", "0.000032"]
