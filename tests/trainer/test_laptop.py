"""The command on this machine: results, exit codes, messages, and the same bits after any interruption."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tuning_kit import adapter_hash, command, environment, run_command, save_tiny_base, write_data, write_job

from lorapool_trainer.__main__ import main

JOBS = ("one", "two")
KILLS = 3
"""In the unit suite; `deep` has twenty."""


def test_threads_of_torch_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("sys.argv", ["lorapool-trainer", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two jobs that write a checkpoint after every cycle."""
    folder = tmp_path_factory.mktemp("jobs")
    write_data(folder / "data.jsonl", 24)
    return [
        write_job(folder, "one", "data.jsonl", training={"epochs": 10}, checkpoints={"every": "0s"}),
        write_job(folder, "two", "data.jsonl", training={"epochs": 8, "seed": 9}, checkpoints={"every": "0s"}),
    ]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, jobs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the adapters of a run that was left alone, with whose output a person sees all that happened."""
    out = tmp_path_factory.mktemp("whole")
    done = run_command(base, out, *jobs)
    assert done.returncode == 0, done.stderr
    for name in JOBS:
        assert f"{name}  succeeded  step" in done.stdout
        report = json.loads((out / name / "report.json").read_text())
        assert report["state"] == "Succeeded"
        assert report["metrics"]["validLoss"] < report["metrics"]["baseValidLoss"]
        assert (out / name / "loss.svg").is_file()
    return {name: adapter_hash(out / name) for name in JOBS}


def kill_at_random(base: Path, jobs: list[Path], out: Path, kills: int, seed: int) -> None:
    """Kills the command after a random number of new checkpoints, a number of times, then lets it end."""
    drawn = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(
            command(base, out, *jobs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        known, wanted = set(out.glob("*/checkpoints/0*")), drawn.randint(1, 3)
        while process.poll() is None and len(set(out.glob("*/checkpoints/0*")) - known) < wanted:
            time.sleep(0.02)
        process.kill()
        process.wait()
    done = run_command(base, out, *jobs)
    assert done.returncode == 0, done.stderr


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(
    base: Path, jobs: list[Path], uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    kill_at_random(base, jobs, tmp_path, KILLS, seed=1)
    assert {name: adapter_hash(tmp_path / name) for name in JOBS} == uninterrupted


@pytest.mark.deep
def test_a_run_that_is_killed_at_twenty_random_moments_ends_with_the_same_bits(
    base: Path, jobs: list[Path], uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    kill_at_random(base, jobs, tmp_path, 20, seed=2)
    assert {name: adapter_hash(tmp_path / name) for name in JOBS} == uninterrupted


def test_ctrl_c_writes_checkpoints_and_the_next_run_continues_with_the_same_bits(
    base: Path, jobs: list[Path], uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(base, tmp_path, *jobs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while process.poll() is None and not list(tmp_path.glob("one/checkpoints/0*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "the same command continues from here" in out
    assert json.loads((tmp_path / "computing.json").read_text())["computing"] == {}
    assert run_command(base, tmp_path, *jobs).returncode == 0
    assert {name: adapter_hash(tmp_path / name) for name in JOBS} == uninterrupted


def without_torch(base: Path, out: Path, *jobs: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import torch."""
    code = "import sys; sys.modules['torch'] = None; from lorapool_trainer.__main__ import main; sys.exit(main())"
    arguments = command(base, out, *jobs)[3:]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment()
    )


def test_what_is_wrong_with_a_file_is_said_by_file_and_field_without_torch(base: Path, tmp_path: Path) -> None:
    """Before seconds of imports, and before the base is loaded."""
    data = write_data(tmp_path / "data.jsonl")
    wrong = {
        "list.yaml": ("- 1\n", "is no FineTuneJob: it needs `apiVersion: lorapool.dev/v1alpha1`"),
        "empty.yaml": ("", "holds no object"),
        "broken.yaml": ("a: [", "cannot be read"),
    }
    for name, (text, said) in wrong.items():
        (tmp_path / name).write_text(text)
        done = without_torch(base, tmp_path / "out", tmp_path / name)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    remote = write_job(tmp_path, "remote", "store://files/file-1")
    assert "must be a path or a file:// URI" in without_torch(base, tmp_path / "out", remote).stderr
    high = write_job(tmp_path, "high", data, lora={"rank": 1000})
    assert "spec.lora.rank: Input should be less than" in without_torch(base, tmp_path / "out", high).stderr
    good = write_job(tmp_path, "good", data)
    assert "two jobs are named good" in without_torch(base, tmp_path / "out", good, good).stderr
    assert "it has no config.json" in without_torch(tmp_path, tmp_path / "out", good).stderr
    with_torch = without_torch(base, tmp_path / "out", good)  # what is right goes on to the engine
    assert "import of torch halted" in with_torch.stderr


def test_a_job_whose_data_is_refused_fails_with_its_line_and_exit_code_1(base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    data.write_text(data.read_text() + "[]\n")
    done = run_command(base, tmp_path / "out", write_job(tmp_path, "one", f"file://{data}"))
    assert done.returncode == 1
    assert "one  Failed: InvalidDataset: Line 17 holds an array" in done.stdout
    report = json.loads((tmp_path / "out" / "one" / "report.json").read_text())
    assert report["failure"]["line"] == 17
    shutil.rmtree(tmp_path / "out")
