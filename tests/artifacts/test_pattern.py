"""Expressions are matched as Python matches them, in linear time, or they are refused."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_artifacts.checks.pattern import MAX_CHARS, Pattern, PatternError

MODULES = [f"model.layers.{i}.{m}" for i in (0, 1, 10) for m in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
MODULES += ["lm_head", "model.embed_tokens", "model.layers.1.mlp.experts.3.gate_proj", ""]

LEAVES = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "per_layer_input_gate",
    "per_layer_projection", "linear_left", "linear_right", "correction_coefs", "prediction_coefs", "modality_router",
    "ffw_layer_1", "ffw_layer_2", "linear_start", "linear_end", "pos_proj", "post", "embedding_projection",
    "input_proj_linear",
]  # fmt: skip
PARTS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense"
UNSLOTH_LONG = (
    rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{'|'.join(LEAVES)}))"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{'|'.join(LEAVES)})))"
)
"""As Unsloth writes it for Gemma 3n: 744 characters."""
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
        r"\Alm_head$",
        r"(?i)LM_.*",
        r"(a|b*)*",
        r"",
        UNSLOTH,
        UNSLOTH_LONG,
    ],
)
def test_expressions_people_write_match_as_python_matches_them(expression: str) -> None:
    found = [module for module in MODULES if Pattern(expression).fullmatch(module)]
    assert found == [module for module in MODULES if re.fullmatch(expression, module)]
    assert len(found) < len(MODULES)


_ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\w",
        r"\W",
        r"\d",
        "[ab]",
        "[^a]",
        "[]a]",
        r"[\]-]",
        r"\b",
        r"\B",
        "^",
        "$",
        r"\x61",
        "[[]",
    ]
)
_REPEATS = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{1,}", "??"])
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
@given(EXPRESSIONS, st.lists(st.text("ab.1-]", min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_expression_matches_as_python_matches_it(expression: str, texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of Python's about sets in sets
        ours = Pattern(expression)
        for text in texts:
            assert ours.fullmatch(text) is (re.fullmatch(expression, text) is not None), (expression, text)


@pytest.mark.parametrize("expression", ["(a+)+z", "(.*.*.*)*z", "(a|aa)+z", "(.*a){20}z", "((a?){30}){30}z"])
def test_what_holds_pythons_matcher_for_hours_is_matched(expression: str) -> None:
    assert Pattern(expression).fullmatch("a" * 20_000) is False


@pytest.mark.parametrize("text", ["a\n", "ä", "a\x00"])
def test_text_that_the_engines_read_differently_is_not_decided(text: str) -> None:
    assert Pattern(".*").fullmatch(text) is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(?=a)b", r"\(\?="),
        ("(?!a)b", r"\(\?!"),
        ("(?<=a)b", r"\(\?<"),
        (r"(a)\1", r"\\\\1"),
        (r"a{,2}", r"\{,"),
        ("[[:alpha:]]", r"\[:"),
        ("ä", "xe4"),
        (r"a\Z", r"\\Z"),
        ("a*+", r"\*\+"),
        ("((a{99}){99}){99}", "repetition"),
        ("a" * (MAX_CHARS + 1), "a bound of Lorapool's own"),
        ("(", "unterminated"),
    ],
)
def test_what_it_does_not_match_as_python_does_is_refused_in_words(expression: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        Pattern(expression)
