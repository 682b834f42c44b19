"""Scores one answer of an example fine-tune against its held-out line, from 0 to 1. Pure.

A task's scores are the means over its lines. The same function scores the base and the fine-tune.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from finetune_tasks import Line

ENTITY_KEYS = ("people", "organizations", "places")
QUEUES = ("billing", "delivery", "returns", "account", "technical", "sales")
FEELINGS = ("positive", "negative", "neutral")
LABELS = frozenset(QUEUES + FEELINGS)
CHRF_ORDER = 6
CHRF_BETA = 2.0

Scores = dict[str, float]


def expected(line: Line) -> str:
    text: str = line["messages"][-1]["content"]
    return text


def score_label(answer: str, line: Line) -> Scores:
    """`right`: the answer is exactly the label, apart from case, outer spaces and one full stop.

    `named`: the right label is the only one that occurs in the answer, which is fairer to a base that says more.
    """
    wanted = expected(line)
    given = answer.strip().removesuffix(".").casefold()
    labels = set(_words(line["messages"][0]["content"])) & LABELS
    return {"right": float(given == wanted), "named": float(labels & set(_words(answer)) == {wanted})}


def score_entities(answer: str, line: Line) -> Scores:
    found = parse_entities(answer)
    if found is None:
        return {"valid_json": 0.0, "right": 0.0}
    wanted = json.loads(expected(line))
    same = all(Counter(found[key]) == Counter(wanted[key]) for key in ENTITY_KEYS)
    return {"valid_json": 1.0, "right": float(same)}


def parse_entities(answer: str) -> dict[str, list[str]] | None:
    """The three lists of names, or None when the answer is anything else."""
    try:
        found: Any = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(found, dict) or set(found) != set(ENTITY_KEYS):
        return None
    lists = [found[key] for key in ENTITY_KEYS]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        return None
    return found


def score_translation(answer: str, line: Line) -> Scores:
    wanted = expected(line)
    return {"chrf": chrf(answer, wanted), "exact": float(_words(answer) == _words(wanted))}


def score_facts(answer: str, line: Line) -> Scores:
    given = _fact_words(answer)
    hits = [fact for fact in line["facts"] if _contains(given, _fact_words(fact))]
    return {"fact_recall": len(hits) / len(line["facts"]), "all_facts": float(len(hits) == len(line["facts"]))}


def chrf(answer: str, wanted: str) -> float:
    """Character n-gram F-score (orders 1 to 6, spaces ignored, beta 2), averaged over orders as chrF defines it."""
    got, want = "".join(answer.split()), "".join(wanted.split())
    precisions: list[float] = []
    recalls: list[float] = []
    for order in range(1, CHRF_ORDER + 1):
        have, need = _grams(got, order), _grams(want, order)
        if not need:
            continue
        shared = sum((have & need).values())
        precisions.append(shared / have.total() if have else 0.0)
        recalls.append(shared / need.total())
    if not recalls:
        return float(not got)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[at : at + order] for at in range(len(text) - order + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _fact_words(text: str) -> list[str]:
    """Words and numbers. "1.6", "BF-20" and "E3" are one word each, so that "16" or "B" does not match them."""
    return re.findall(r"\w+(?:[.\-]\w+)*", text.casefold())


def _contains(words: list[str], fact: list[str]) -> bool:
    return any(words[at : at + len(fact)] == fact for at in range(len(words) - len(fact) + 1))


SCORERS: dict[str, Callable[[str, Line], Scores]] = {
    "translation": score_translation,
    "routing": score_label,
    "manual-qa": score_facts,
    "sentiment": score_label,
    "entities": score_entities,
}
