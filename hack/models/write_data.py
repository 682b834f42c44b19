"""Turns the hand-written sources in hack/models/data into the chat lines of examples/finetunes/<task>/*.jsonl.

Run after a source is edited: `python hack/models/write_data.py [task ...]`; a test compares the
committed lines with it.
In a source, "#" begins a comment, "-" a training line and "*" a held-out line; the comment at the top of each source
describes the rest. A line that cannot be read is an error, and so is a held-out question that is also trained on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

from finetune_tasks import SOURCES, Line, Task, chosen

KINDS = {"P": "people", "O": "organizations", "L": "places"}
MARK = re.compile(r"\[([^\]/]+)/([POL])\]")


class SourceError(ValueError):
    """A source line that cannot be read."""


def written(task: Task) -> tuple[list[Line], list[Line]]:
    """The task's training and held-out lines."""
    train: list[Line] = []
    heldout: list[Line] = []
    for is_heldout, question, answer, facts in _pairs(task):
        messages = [
            {"role": "system", "content": task.system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        line: Line = {"messages": messages}
        if is_heldout and facts:
            line["facts"] = facts
        (heldout if is_heldout else train).append(line)
    asked = {line["messages"][1]["content"].casefold() for line in train}
    for line in heldout:
        if line["messages"][1]["content"].casefold() in asked:
            raise SourceError(f"{task.name}: in both splits: {line['messages'][1]['content']}")
    return train, heldout


def _pairs(task: Task) -> Iterator[tuple[bool, str, str, list[str]]]:
    """(held-out?, question, answer, facts) for every line of the source."""
    section = ""
    facts: list[str] = []
    path = SOURCES / f"{task.name}.txt"
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        sign, _, rest = text.partition(" ")
        if not text or sign == "#":
            continue
        if sign == "==":
            section, _, tail = rest.partition(" || ")
            facts = [fact.strip() for fact in tail.split("|") if fact.strip()]
            continue
        if sign not in {"-", "*"}:
            raise SourceError(f"{path.name}:{number}: a line begins with #, ==, - or *")
        question, answer = _pair(task, rest, section)
        if not question or not answer:
            raise SourceError(f"{path.name}:{number}: question or answer is missing")
        yield sign == "*", question, answer, facts


def _pair(task: Task, rest: str, section: str) -> tuple[str, str]:
    if task.name == "translation":
        english, _, spanish = rest.partition(" = ")
        return english.strip(), spanish.strip()
    if task.name == "entities":
        found: dict[str, list[str]] = {kind: [] for kind in KINDS.values()}
        for name, kind in MARK.findall(rest):
            if name not in found[KINDS[kind]]:
                found[KINDS[kind]].append(name)
        return MARK.sub(r"\1", rest), json.dumps(found, ensure_ascii=False)
    return rest, section


def main() -> None:
    for task in chosen(sys.argv[1:]):
        task.folder.mkdir(parents=True, exist_ok=True)
        splits = dict(zip(("train", "heldout"), written(task), strict=True))
        for name, lines in splits.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (task.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{task.name}: {len(splits['train'])} training and {len(splits['heldout'])} held-out lines")


if __name__ == "__main__":
    main()
