"""How answers are scored."""

from __future__ import annotations

import pytest
from finetune_metrics import chrf, score_entities, score_facts, score_label, score_translation
from finetune_tasks import Line


def line(answer: str, **more: object) -> Line:
    return {"messages": [{"role": "assistant", "content": answer}], **more}


@pytest.mark.parametrize(
    ("said", "right", "named"),
    [
        ("billing", 1.0, 1.0),
        (" Billing.\n", 1.0, 1.0),
        ("The queue is billing", 0.0, 1.0),
        ("billing or sales", 0.0, 0.0),
        ("sales", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_a_label_is_right_alone_and_named_when_no_other_is(said: str, right: float, named: float) -> None:
    asked = {"role": "system", "content": "Billing, delivery or sales?"}
    wanted = {"messages": [asked, *line("billing")["messages"]]}
    assert score_label(said, wanted) == {"right": right, "named": named}


@pytest.mark.parametrize(
    ("said", "valid", "right"),
    [
        ('{"people": ["Bo", "Al"], "organizations": [], "places": []}', 1.0, 1.0),
        ('{"people": ["Al"], "organizations": [], "places": []}', 1.0, 0.0),
        ('{"people": ["Al", "Al", "Bo"], "organizations": [], "places": []}', 1.0, 0.0),
        ('{"people": ["Al", "Bo"], "organizations": []}', 0.0, 0.0),
        ('{"people": "Al", "organizations": [], "places": []}', 0.0, 0.0),
        ("People: Al, Bo", 0.0, 0.0),
        ('["Al", "Bo"]', 0.0, 0.0),
    ],
)
def test_entities_are_right_when_each_list_holds_the_same_names(said: str, valid: float, right: float) -> None:
    wanted = line('{"people": ["Al", "Bo"], "organizations": [], "places": []}')
    assert score_entities(said, wanted) == {"valid_json": valid, "right": right}


@pytest.mark.parametrize(
    ("said", "recall"),
    [
        ("It holds 1.6 litres.", 1.0),
        ("It holds 11.6 litres.", 0.0),
        ("It holds 16 litres.", 0.0),
        ("1.6", 1.0),
    ],
)
def test_a_number_counts_only_whole(said: str, recall: float) -> None:
    assert score_facts(said, line("", facts=["1.6"]))["fact_recall"] == recall


def test_facts_count_by_share_and_a_fact_of_two_words_in_order() -> None:
    said = line("", facts=["BF-20", "silicone grease"])
    assert score_facts("Use silicone grease.", said) == {"fact_recall": 0.5, "all_facts": 0.0}
    assert score_facts("Grease of silicone; BF-20.", said)["fact_recall"] == 0.5


def test_chrf_is_one_for_the_reference_and_zero_for_nothing_in_common() -> None:
    assert chrf("¿Dónde está?", "¿Dónde está?") == 1.0
    assert chrf("xyz", "abc") == 0.0
    assert chrf("", "abc") == 0.0


def test_chrf_of_one_wrong_word_lies_between() -> None:
    # precision and recall are equal here: 1-grams 8/10, 2-grams 6/9, 3-grams 4/8, 4-grams 2/7, 5-grams 1/6, 6-grams 0/5
    assert chrf("abcdexxhij", "abcdefghij") == pytest.approx((8 / 10 + 6 / 9 + 4 / 8 + 2 / 7 + 1 / 6 + 0) / 6)


def test_a_translation_is_exact_whatever_its_punctuation() -> None:
    assert score_translation("Gracias", line("¡Gracias!"))["exact"] == 1.0
