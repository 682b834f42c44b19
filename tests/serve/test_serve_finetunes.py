"""`make serve` with the real runtime: the five example fine-tunes answer, and leave the device when idle."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from serve_kit import serving

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE_URI = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
COMMAND = (sys.executable, "-m", "lorapool_runtime")
IDLE = "  adapterDefaults:\n    idleAfter: 2s"
ANSWERS = {
    "translation": "La llave de mi habitación no funciona.",
    "routing": "returns",
    "sentiment": "negative",
    "entities": '{"people": ["Petra Novotna"], "organizations": ["Skoda"], "places": ["Prague"]}',
}


@pytest.fixture
def real_base() -> Path:
    folder = os.environ.get("LORAPOOL_TEST_BASE", "")
    if not (Path(folder) / "config.json").is_file():
        pytest.skip("LORAPOOL_TEST_BASE names no base model folder: `make test` makes it and sets it")
    return Path(folder)


def test_the_five_finetunes_of_the_examples_answer_and_are_unloaded_when_idle(
    real_base: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    shutil.copytree(EXAMPLES / "finetunes", folder / "finetunes")
    base = (EXAMPLES / "basemodel.yaml").read_text()
    (folder / "basemodel.yaml").write_text(base.replace("  adapterDefaults:\n    idleAfter: 5m", IDLE))
    shutil.copy(EXAMPLES / "finetunes.yaml", folder)
    began_s = time.monotonic()
    with serving(folder, tmp_path / "serve", COMMAND, "--local-base", f"{BASE_URI}={real_base}") as served:
        served.until((served.state / "summary.json").exists)
        questions = {item["task"]: item for item in json.loads((EXAMPLES / "finetunes" / "demo.json").read_text())}
        answers = {
            task: served.ask(task, messages=item["messages"], max_tokens=item["max_tokens"], temperature=0)
            for task, item in questions.items()
        }
        record_property("seconds until the five had answered", round(time.monotonic() - began_s, 1))
        assert {f"default/{task}" for task in questions} <= set(served.summary()["models"])
        assert {task: answers[task] for task in ANSWERS} == ANSWERS
        assert "6" in answers["manual-qa"]
        served.until(lambda: served.output.count("Parked") > len(questions))
        assert served.interrupt() == 0
    assert served.children() == []
