"""The lines of the example fine-tunes: well-formed, as written in the sources, and truly held out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from finetune_metrics import ENTITY_KEYS, parse_entities, score_facts
from finetune_tasks import DEMO, SCORES, TASKS, Line, Task, read_lines
from write_data import SourceError, written

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
SPLITS = ("train", "heldout")


def lines(task: Task, split: str) -> list[Line]:
    return read_lines(task.folder / f"{split}.jsonl")


def question(line: Line) -> str:
    text: str = line["messages"][1]["content"]
    return text


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def word_changes(one: list[str], other: list[str]) -> int:
    """Words to put in, take out or replace to make the one the other."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        last, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]


@EVERY_TASK
def test_every_line_is_a_system_a_user_and_an_assistant_message(task: Task) -> None:
    for split in SPLITS:
        for line in lines(task, split):
            assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]
            assert line["messages"][0]["content"] == task.system
            assert all(message["content"] == message["content"].strip() != "" for message in line["messages"])


@EVERY_TASK
def test_the_committed_lines_are_those_of_the_source(task: Task) -> None:
    assert written(task) == tuple(lines(task, split) for split in SPLITS)


@EVERY_TASK
def test_there_are_a_few_hundred_lines_and_no_question_twice(task: Task) -> None:
    asked = [question(line) for split in SPLITS for line in lines(task, split)]
    assert 200 <= len(asked) <= 500
    assert len({text.casefold() for text in asked}) == len(asked)
    assert len(lines(task, "heldout")) >= 50


@EVERY_TASK
def test_no_held_out_question_is_a_training_question_with_a_word_changed(task: Task) -> None:
    trained = [words(question(line)) for line in lines(task, "train")]
    for line in lines(task, "heldout"):
        here = words(question(line))
        near = [other for other in trained if abs(len(other) - len(here)) <= 1 and word_changes(here, other) <= 1]
        assert near == [], question(line)


@pytest.mark.parametrize("name", ["routing", "sentiment"])
def test_the_labels_are_balanced_and_named_in_the_system_message(name: str) -> None:
    task = TASKS[name]
    for split in SPLITS:
        answers = [line["messages"][-1]["content"] for line in lines(task, split)]
        counts = [answers.count(label) for label in set(answers)]
        assert max(counts) <= 1.3 * min(counts)
        assert all(label in task.system.casefold() for label in set(answers))


def test_every_entity_answer_is_json_whose_names_stand_in_the_text() -> None:
    for split in SPLITS:
        for line in lines(TASKS["entities"], split):
            found = parse_entities(line["messages"][-1]["content"])
            assert found is not None
            assert list(found) == list(ENTITY_KEYS)
            assert all(name in question(line) for names in found.values() for name in names)


def test_every_manual_answer_holds_its_own_facts() -> None:
    for line in lines(TASKS["manual-qa"], "heldout"):
        assert score_facts(line["messages"][-1]["content"], line)["all_facts"] == 1.0, question(line)


def test_a_source_line_without_a_mark_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "routing.txt").write_text("== billing\nno mark in front\n")
    monkeypatch.setattr("write_data.SOURCES", tmp_path)
    with pytest.raises(SourceError, match=r"routing\.txt:2"):
        written(TASKS["routing"])


def test_the_demo_asks_each_fine_tune_one_held_out_question() -> None:
    demo = json.loads(DEMO.read_text())
    assert sorted(row["task"] for row in demo) == sorted(TASKS)
    for row in demo:
        task = TASKS[row["task"]]
        assert task.max_tokens <= row["max_tokens"] <= 64  # room for the base, which does not stop by itself
        assert row["messages"] in [line["messages"][:-1] for line in lines(task, "heldout")]


def test_scores_are_of_the_held_out_lines_that_are_there() -> None:
    scores = json.loads(SCORES.read_text())["tasks"]
    assert {name: score["heldout_lines"] for name, score in scores.items()} == {
        name: len(lines(task, "heldout")) for name, task in TASKS.items()
    }
