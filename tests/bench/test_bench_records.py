"""Statistics of records, the random processes of workloads, and the page generated from the results."""

import dataclasses
import json
import statistics
from pathlib import Path

import page
import pytest
from common.records import (
    Record,
    against,
    alternate,
    measured,
    not_run,
    percentile,
    read_records,
    slug,
    table,
    write_records,
)
from common.svg import BarRow, bar_chart
from common.targets import TARGETS, Target
from common.workloads import TOKEN_IDS, gaps_s, mixed_rank, open_loop, popularity, w1


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    record = against("x", "tok/s", [10, 20, 90], "baseline", [10, 10, 100])
    assert record.ratio == 1.0
    assert (record.ratio_low, record.ratio_high) == (0.9, 2.0)
    assert record.value == 20
    assert record.baseline_value == 10


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        against("x", "tok/s", [1, 2], "baseline", [1])
    with pytest.raises(ValueError, match="no runs"):
        measured("x", "ms", [])


def test_rounds_alternate_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    runs = alternate({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert runs == {"a": [3, 5, 7], "b": [4, 6, 8]}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_a_percentile_is_the_nearest_rank(share: float, value: int) -> None:
    assert percentile(range(100, 0, -1), share) == value


def test_records_survive_their_file(tmp_path: Path) -> None:
    records = [against("a.b", "s", [1.0, 2.0], "r", [2.0, 2.0], "note"), not_run("c", "s", "not installed")]
    write_records(tmp_path / "r.json", records, {"torch": "2"})
    assert read_records(tmp_path / "r.json") == (records, {"torch": "2"})


def test_a_row_that_was_not_run_is_printed_with_its_reason() -> None:
    assert "not run: not installed" in table([not_run("c", "s", "not installed")])


def test_a_machines_slug_names_processor_and_cores_only() -> None:
    assert slug({"cpu": "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz", "cores": 4}) == "intel-xeon-gold-6130-4-cores"
    assert slug({"cpu": "AMD EPYC 7B13 64-Core Processor", "cores": 2}) == "amd-epyc-7b13-2-cores"


@pytest.mark.parametrize(
    ("target", "ratio", "result"),
    [
        (Target("x", "at least", "ratio", at_least=0.85), 0.85, "met"),
        (Target("x", "at least", "ratio", at_least=0.85), 0.84, "not met"),
        (Target("x", "at most", "ratio", at_most=2), 2.1, "not met"),
        (Target("x", "at most", "ratio", at_most=2), None, "not run"),
    ],
)
def test_a_bar_is_met_at_its_bound(target: Target, ratio: float | None, result: str) -> None:
    assert target.result(Record("x", "s", 1.0, (1.0,), ratio=ratio)) == result


def test_bars_have_names_of_their_own() -> None:
    assert len({target.record for target in TARGETS}) == len(TARGETS)


# --- workloads ----------------------------------------------------------------------------


def test_popularity_is_a_power_law_that_sums_to_one() -> None:
    shares = popularity(100, alpha=1.0)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] / shares[9] == pytest.approx(10.0)
    assert popularity(4, alpha=0.0) == [0.25] * 4


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    import random

    draw = random.Random(3)
    gaps = [gaps_s(draw, 5.0, cv) for _ in range(60_000)]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) / mean == pytest.approx(cv, rel=0.1)


def test_arrivals_and_lengths_are_the_same_for_any_number_of_adapters() -> None:
    few = open_loop(adapters=5, per_s=20, duration_s=30, seed=4)
    many = open_loop(adapters=500, per_s=20, duration_s=30, seed=4)
    assert [(a.at_s, a.prompt, a.new) for a in few] == [(a.at_s, a.prompt, a.new) for a in many]
    assert max(a.adapter for a in few) <= 4 < max(a.adapter for a in many) < 500
    assert len(few) == pytest.approx(600, rel=0.15)
    assert all(1 <= len(a.prompt) <= 64 and 1 <= a.new <= 64 for a in few)


def test_w1_is_16_requests_of_32_and_64_tokens() -> None:
    for case in ("base", "one", "four", "distinct16", "mixed_ranks", "shuffled"):
        batch = w1(case, seed=2)
        assert {len(prompt) for prompt in batch.prompts} == {32}
        assert batch.tokens == 1024
        assert all(token in TOKEN_IDS for prompt in batch.prompts for token in prompt)
    assert len(set(w1("distinct16").adapters)) == 16
    assert len(set(w1("four").adapters)) == 4
    assert {mixed_rank(number) for number in range(16)} == {4, 8, 16, 32, 64}


def test_shuffled_is_the_same_requests_in_another_order() -> None:
    ordered, shuffled = w1("distinct16", seed=5), w1("shuffled", seed=5)
    pairs = set(zip(ordered.prompts, ordered.adapters, strict=True))
    assert set(zip(shuffled.prompts, shuffled.adapters, strict=True)) == pairs
    assert shuffled.adapters != ordered.adapters


# --- the page -----------------------------------------------------------------------------


def test_the_committed_page_and_pictures_are_what_the_results_give() -> None:
    wanted = page.pages(page.Results.read(page.newest_results()))
    assert [path.name for path, text in wanted.items() if path.read_text() != text] == []


def test_the_latest_results_hold_a_row_for_every_bar() -> None:
    body = json.loads(page.newest_results().read_text())
    assert {target.record for target in TARGETS} <= {item["name"] for item in body["records"]}
    assert all(item["result"] in ("met", "not met", "not run") for item in body["records"] if "target" in item)


def test_a_template_with_an_unknown_part_is_refused() -> None:
    results = page.Results.read(page.newest_results())
    with pytest.raises(ValueError, match="asks for 'weather'"):
        page.render("<!-- weather -->\n", results)


def test_an_open_loop_is_one_line_of_the_page_and_not_repeated_below() -> None:
    results = page.Results.read(page.newest_results())
    names = ("first_token_p50_ms", "first_token_p99_ms", "inter_token_p50_ms", "inter_token_p99_ms")
    records = [measured(f"w3.alpha0.3.{name}", "ms", [10.0 + n]) for n, name in enumerate(names)]
    records += [measured("w3.alpha0.3.first_within_1s", "share", [1.0]), measured("w3.alpha0.3.rate", "tok/s", [99.0])]
    records += [measured("w5.disk_first_token_ms", "ms", [50.0])]
    results = dataclasses.replace(results, records={record.name: record for record in records})
    line = "| W3: 100 adapters, α = 0.3 | 10.0 / 11.0 | 1.00 / - | 12.0 / 13.0 | 99.0 |"
    assert page.loops(results).splitlines()[2:] == [line]
    assert [row.split("`")[1] for row in page.rest(results).splitlines()[2:]] == ["w5.disk_first_token_ms"]


def test_a_missed_and_a_missing_bar_are_both_shown() -> None:
    results = page.Results.read(page.newest_results())
    first, second = TARGETS[0], TARGETS[1]
    records = {
        first.record: against(first.record, "tok/s", [1.0], "base", [4.0]),
        second.record: not_run("", "", "why"),
    }
    text = page.targets(dataclasses.replace(results, records=records))
    assert "| ≥ 0.85 | 0.25 |" in text
    assert "**not met**" in text
    assert "not run: why" in text


def test_a_picture_escapes_text_and_says_what_was_not_run() -> None:
    drawn = bar_chart("a < b", [BarRow("x & y", 2.0, 1.5, 2.5), BarRow("z", None)], "tok/s", mark=1.0)
    assert "a &lt; b" in drawn
    assert "x &amp; y" in drawn
    assert "not run" in drawn


def test_the_page_says_which_program_was_run_again_when_and_where() -> None:
    results = page.Results.read(page.newest_results())
    machine = {"cores": 8, "cpu": "Other", "simd": "AVX-512"}
    again = {"training.py": {"date": "2027-01-02", "commit": "abc", "machine": machine, "load_average": 0.5}}
    text = page.machine(dataclasses.replace(results, head={**results.head, "again": again}))
    assert "`training.py` was run again on 2027-01-02 at commit `abc`, load average 0.5" in text
    assert "8 cores of an Other (AVX-512)" in text
