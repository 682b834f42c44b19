"""Code and pages use the field's standard terms; each pattern here is a home-made word that has one."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".cpp", ".h", ".yaml", ".tpl", ".txt", ".toml", ".sh", ".go", ""}
DATA = ("hack/models/data/", "examples/finetunes/", "tests/test_words.py", "LICENSE")
WORDS = {
    r"((?-i:Called by)|[;,] called by)\b": "delete it: tools know the callers",
    r"told\b": "reported, emitted",
    r"beside\b": "concurrently, next to, in addition to",
    r"where (it|they|each|every\w*) lies?\b": "where it is stored",
    r"(lie|lies|lying) (in|at|on|there|where)\b": "is stored, is",
    r"(its|their|'s) homes?\b": "preferred replica",
    r"(?-i:park(s|ed|ing)?)\b": "unload when idle; unloaded (the condition reason Parked is API)",
    r"stretch(es)?\b": "contiguous region",
    r"of (one|the same) make\b": "of the same config and shapes",
    r"bare proxy\b": "minimal baseline",
    r"spen(d|ds|t) (a|the|its) plans?\b": "apply a plan",
    r"way_(probe|costs)\b": "autotuning",
    r"step_recipe\b": "op graph",
    r"gather_s\b": "batching_window_s",
    r"(nobody|somebody|whoever|anew)\b": "no caller, any, again",
    r"(rival|contestant)s?\b": "baseline, engine under test",
    r"(?<!status\.)(verdict|judge[sd]?|judging|judge?ment)s?\b(?!(?<=judged)[:=`])": (
        "checked / validated, result (the status field judged is API)"
    ),
}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.splitlines() if not name.startswith(DATA) and not name.endswith(".lock")]
    return [path for name in files if (path := ROOT / name).suffix in TEXT and path.is_file()]


@pytest.mark.parametrize("word", WORDS)
def test_a_home_made_word_is_not_used_where_a_standard_term_exists(word: str) -> None:
    pattern = re.compile(rf"(?i)(?<![a-zA-Z]){word}")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == [], f"write instead: {WORDS[word]}"
