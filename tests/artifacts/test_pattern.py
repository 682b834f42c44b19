"""The bounded matcher agrees with Python's, and gives up where Python's would run for hours."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_artifacts import pattern as pattern_module
from lorapool_artifacts.pattern import Pattern, PatternError

MODULES = [f"model.layers.{i}.{m}" for i in (0, 1, 10) for m in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
MODULES += ["lm_head", "model.embed_tokens", "model.layers.1.mlp.experts.3.gate_proj", ""]

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|up_proj)))"
)


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.(0|[1-9])\.self_attn\..*",
        r"^model\.layers\.\d+\.mlp\.(up|down)_proj$",
        r".*layers\.1\b.*",
        r".*\.layers\.[0-1]\..*(q|k)_proj",
        r"(model\.)?layers\.\d{2,}.*",
        r"(?P<stem>.*)norm",
        r"[^.]+|x",
        r"\Alm_head\Z",
        r"(a|b*)*",
        r"",
        UNSLOTH,
    ],
)
def test_expressions_people_write_match_as_python_matches_them(expression: str) -> None:
    found = [module for module in MODULES if Pattern(expression).fullmatch(module)]
    assert found == [module for module in MODULES if re.fullmatch(expression, module)]
    assert len(found) < len(MODULES)


_ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\w", r"\W", r"\d", "[ab]", "[^a]", "[]a]", r"[\]-]", r"\b", "^", "$", r"\n", r"\Z"]
)
_REPEATS = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}", "??"])
EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: f"({'|'.join(ways)})"),
        st.tuples(inner, _REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=8,
)


@settings(max_examples=400)
@given(EXPRESSIONS, st.lists(st.text("ab.1-\n]", max_size=6), min_size=1, max_size=4))
def test_any_expression_matches_as_python_matches_it(expression: str, texts: list[str]) -> None:
    ours = Pattern(expression)
    for text in texts:
        assert ours.fullmatch(text) is (re.fullmatch(expression, text) is not None), (expression, text)


@pytest.mark.parametrize("expression", ["(a+)+z", "(.*.*.*)*z", "(a|aa)+z", "(.*a){20}z", "((a?){30}){30}z"])
def test_what_holds_pythons_matcher_for_hours_takes_less_than_a_second(expression: str) -> None:
    started_s = time.monotonic()
    assert Pattern(expression).fullmatch("a" * 200) in (False, None)
    assert time.monotonic() - started_s < 2


def test_past_its_budget_a_pattern_answers_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_module, "MAX_WORK", 10)
    pattern = Pattern("(a|b|ab)*c")
    assert pattern.fullmatch("ab" * 20) is None
    assert pattern.fullmatch("c") is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(?=a)b", "look-around"),
        ("(?!a)b", "look-around"),
        ("(?<=a)b", "look-around"),
        ("(?i)a", "flags"),
        (r"(a)\1", r"escape \\1"),
        (r"\x41", r"escape \\x"),
        (r"a\Bb", r"escape \\B"),
        ("a*+", "possessive"),
        ("((a{99}){99}){99}", "too large"),
        ("(" * 60 + "a" + ")" * 60, "too deeply"),
        ("a" * 513, "longer than 512"),
        ("(", "unterminated"),
    ],
)
def test_what_it_does_not_match_is_refused_in_words(expression: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        Pattern(expression)
