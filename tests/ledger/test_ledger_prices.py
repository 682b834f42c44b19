"""Price lists: what is refused, in words; a price in effect never changes; which price holds for whom."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from lorapool_api.currency import rounded
from lorapool_ledger.billing.prices import (
    GIB_HOUR_BYTE_NS,
    LineItem,
    Price,
    PriceList,
    PriceListError,
    amount_of,
    newly_effective,
    parse_prices,
)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def entry(**fields: str) -> str:
    given = {"effectiveFrom": "2026-11-01", "scope": '"*"', "currency": "EUR", "promptPerMillion": "0.25"} | fields
    return "  - {" + ", ".join(f"{key}: {value}" for key, value in given.items() if value) + "}\n"


def listed(*entries: str) -> str:
    return "prices:\n" + "".join(entries)


def test_a_list_is_read_with_the_exact_decimals_that_it_has() -> None:
    text = listed(entry(promptPerMillion="0.1", residencyPerGiBHour="0.000000000001", requestEach="1e-3"))
    pods = "pods:\n  - {effectiveFrom: 2026-11-01T00:00:00Z, profile: gpu, currency: EUR, podPerHour: 2.40}\n"
    prices = parse_prices(text + pods)
    assert {price.item: price.amount for price in prices} == {
        LineItem.PROMPT: Decimal("0.1"),
        LineItem.RESIDENCY: Decimal("1E-12"),
        LineItem.REQUEST: Decimal("0.001"),
        LineItem.POD: Decimal("2.40"),
    }
    assert {price.effective_unix_s for price in prices} == {at("2026-11-01")}
    assert parse_prices("") == parse_prices("prices: []\npods: []\n") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (listed(entry(promptPerMillion="-1")), "prices[0].promptPerMillion -1 is negative; refunds are corrections"),
        (listed(entry(promptPerMillion=".nan")), "prices[0].promptPerMillion '.nan' is no number"),
        (listed(entry(promptPerMillion="NaN")), "'NaN' is no number; write a decimal such as 0.25"),
        (listed(entry(promptPerMillion="Infinity")), "'Infinity' is no number"),
        (listed(entry(promptPerMillion="'1,5'")), "'1,5' is no number"),
        (listed(entry(promptPerMillion="[1]")), "is no number"),
        (listed(entry(promptPerMillion="1e400")), "has to be below"),
        (listed(entry(promptPerMillion="1e-400")), "with at most 12 decimals"),
        (listed(entry(promptPerMillion="")), "prices[0] has no price; it needs one of promptPerMillion"),
        (listed(entry(currency="EURO")), "currency 'EURO' is unknown; write a code of ISO 4217 such as EUR"),
        (listed(entry(currency="XXX")), "currency 'XXX' is unknown"),
        (listed(entry(currency="")), "prices[0].currency is missing"),
        (listed(entry(scope="acme")), "scope 'acme' has to be *, a `namespace/`"),
        (listed(entry(scope="<script>/x")), "has to be *"),
        (listed(entry(effectiveFrom="2027-02-29")), "'2027-02-29' is no day of the calendar"),
        (listed(entry(effectiveFrom="2026-11-31")), "'2026-11-31' is no day of the calendar"),
        (listed(entry(effectiveFrom="tomorrow")), "'tomorrow' is no day of the calendar"),
        (listed(entry(effectiveFrom="2026-11-01T00:00:00")), "has no time zone"),
        (listed(entry(effectiveFrom="2026-11-01T12:00:00Z")), "is within a day"),
        (listed(entry(effectiveFrom="2026-11-01T00:00:00+05:30")), "is within a day"),
        (listed(entry(), entry(promptPerMillion="9")), "two entries overlap: prompt of * from 2026-11-01"),
        (listed(entry(), entry(effectiveFrom="2026-12-01", currency="USD")), "several currencies (EUR, USD)"),
        (listed(entry(perMillion="1")), "prices[0].perMillion is unknown; known are cachedPerMillion"),
        ("prices: 5", "prices has to be a list"),
        ("prices: [5]", "prices[0] has to be a mapping"),
        ("- 5", "the list has to be a mapping with `prices` and `pods`"),
        ("price: []", "price is unknown; a list has `prices` and `pods`"),
        ("prices: [", "the list is not YAML"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(PriceListError) as raised:
        parse_prices(text)
    assert words in str(raised.value)


@pytest.mark.parametrize("day", ["2028-02-29", "2026-11-30", "2026-12-31", "2400-02-29"])
def test_leap_days_and_ends_of_months_are_days(day: str) -> None:
    [price] = parse_prices(listed(entry(effectiveFrom=day)))
    assert price.effective_unix_s == at(day)


NOW = at("2026-11-15T10:30:00")
RECORDED = parse_prices(listed(entry()))


def test_the_first_list_may_begin_in_the_past_and_a_later_price_from_today_on() -> None:
    old, today = parse_prices(listed(entry())), parse_prices(listed(entry(), entry(effectiveFrom="2026-11-15")))
    assert newly_effective((), old, NOW) == old
    [found] = newly_effective(old, today, NOW)
    assert found.effective_unix_s == at("2026-11-15")


def test_an_announced_price_is_not_in_effect_and_may_still_change_or_go() -> None:
    for amount in ("0.30", "0.40"):
        announced = parse_prices(listed(entry(), entry(effectiveFrom="2026-12-01", promptPerMillion=amount)))
        assert newly_effective(RECORDED, announced, NOW) == ()
    assert newly_effective(RECORDED, RECORDED, NOW) == ()
    [found] = newly_effective(RECORDED, announced, at("2026-12-01T00:00:00"))
    assert found.amount == Decimal("0.40")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (listed(entry(promptPerMillion="0.26")), "prompt of * from 2026-11-01 was changed from 0.25 EUR to 0.26 EUR"),
        (listed(entry(currency="USD")), "was changed from 0.25 EUR to 0.25 USD"),
        ("", "prompt of * from 2026-11-01 is missing, although it is in effect: put it back (0.25 EUR)"),
        (listed(entry(), entry(effectiveFrom="2026-11-14")), "is new and for a day that is over"),
        (
            listed(entry(), entry(scope="acme/", effectiveFrom="2026-10-01")),
            "let it take effect on 2026-11-15 or later",
        ),
    ],
)
def test_a_price_in_effect_is_never_changed_removed_or_added_for_days_that_are_over(text: str, words: str) -> None:
    with pytest.raises(PriceListError) as raised:
        newly_effective(RECORDED, parse_prices(text), NOW)
    assert words in str(raised.value)


def test_the_same_amount_written_differently_is_no_change() -> None:
    assert newly_effective(RECORDED, parse_prices(listed(entry(promptPerMillion="0.250"))), NOW) == ()


def test_the_price_of_a_model_is_its_own_else_its_projects_else_its_bases_else_that_of_all() -> None:
    scopes = {"*": "1", "pool/base": "2", "acme/": "3", "acme/tone": "4"}
    prices = PriceList(parse_prices(listed(*(entry(scope=f'"{s}"', promptPerMillion=a) for s, a in scopes.items()))))

    def amount(project: str, model: str, base: str) -> int:
        found = prices.price(LineItem.PROMPT, NOW, project=project, model=model, base=base)
        assert found is not None
        return int(found.amount)

    assert amount("acme", "acme/tone", "pool/base") == 4
    assert amount("acme", "acme/other", "pool/base") == 3
    assert amount("acme", "pool/base", "pool/base") == 2  # the base itself has a price of its own
    assert amount("other", "other/tone", "pool/base") == 2
    assert amount("other", "other/tone", "pool/second") == 1


def test_a_price_holds_from_its_day_on_and_none_before() -> None:
    prices = PriceList(parse_prices(listed(entry(), entry(effectiveFrom="2026-12-01", promptPerMillion="0.5"))))

    def amount(when: str) -> Decimal | None:
        found = prices.price(LineItem.PROMPT, at(when), project="a", model="a/b", base="a/c")
        return found.amount if found else None

    assert amount("2026-10-31T23:59:59") is None
    assert amount("2026-11-01") == amount("2026-11-30T23:59:59") == Decimal("0.25")
    assert amount("2026-12-01") == Decimal("0.5")


def test_cached_tokens_without_a_price_of_their_own_cost_as_much_as_the_others() -> None:
    prices = PriceList(parse_prices(listed(entry(), entry(effectiveFrom="2026-12-01", cachedPerMillion="0.05"))))
    november, december = (
        prices.price(LineItem.CACHED, at(day), project="a", model="a/b", base="a/c")
        for day in ("2026-11-02", "2026-12-02")
    )
    assert november is not None
    assert december is not None
    assert (november.amount, december.amount) == (Decimal("0.25"), Decimal("0.05"))


def test_a_pod_costs_what_its_profile_costs() -> None:
    pods = "".join(
        f"  - {{effectiveFrom: 2026-11-01, profile: {profile}, currency: EUR, podPerHour: {amount}}}\n"
        for profile, amount in (("gpu", "2.4"), ('"*"', "0.1"))
    )
    prices = PriceList(parse_prices("pods:\n" + pods))
    assert [getattr(prices.pod_price(name, NOW), "amount", None) for name in ("gpu", "cpu")] == [
        Decimal("2.4"),
        Decimal("0.1"),
    ]
    assert PriceList().pod_price("gpu", NOW) is None


def test_amounts_are_exact_and_rounded_to_the_even_neighbour_once() -> None:
    assert amount_of(LineItem.PROMPT, 1, Decimal("0.25")) == Decimal("0.00000025")
    assert amount_of(LineItem.COMPLETION, 10**15 + 1, Decimal("0.123456789012")) == Decimal(
        "123456789.012000123456789012"
    )
    assert amount_of(LineItem.RESIDENCY, 3 * GIB_HOUR_BYTE_NS // 2, Decimal("0.02")) == Decimal("0.03")
    halves = [rounded(Decimal(text), "EUR") for text in ("0.005", "0.015", "0.025", "-0.005")]
    assert halves == [Decimal("0.00"), Decimal("0.02"), Decimal("0.02"), Decimal("0.00")]
    assert (rounded(Decimal("12.5"), "JPY"), rounded(Decimal("1.2345"), "KWD")) == (Decimal(12), Decimal("1.234"))


def test_a_price_names_itself() -> None:
    assert str(Price(at("2026-11-01"), "*", LineItem.PROMPT, Decimal(1), "EUR")) == "prompt of * from 2026-11-01"
