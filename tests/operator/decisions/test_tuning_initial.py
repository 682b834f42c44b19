"""Jobs that continue an adapter: what is known to be wrong is refused, nothing starts before it is checked, and the
files with which a job began are those that it continues with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tuning_plans import adapter, after, condition, observed, only, plan, report, session, trained, trainer, tuned

from lorapool_api.tuning.states import JobState
from lorapool_operator.decisions.tuning.assignment import trainer_job
from lorapool_operator.world.cluster_cache import AdapterObject
from lorapool_operator.world.tuning import ObservedJob

DIGEST = "sha256:" + "a" * 64


def continues(first: AdapterObject, **lora: Any) -> ObservedJob:
    return replace(observed(initFrom={"name": "first"}, lora=lora), initial=first)


def checked(rank: int = 8, **source: Any) -> AdapterObject:
    return adapter("first", status={"digest": DIGEST, "rank": rank}, **source)


def test_a_trainer_starts_once_the_adapter_is_checked() -> None:
    waits = plan(continues(adapter("first")))
    assert (waits.start, condition(only(waits), "Admitted")) == ((), ("False", "Pending"))
    assert plan(continues(checked())).start
    assert plan(continues(checked(), rank=8)).start


@pytest.mark.parametrize(
    ("first", "lora", "said"),
    [
        (checked(), {"rank": 4}, "spec.lora.rank is 4, but the adapter of spec.initFrom has 8"),
        (checked(rank=200), {}, "Rank 200 is above"),
        (checked(uri="hf://org/first"), {}, "not from the store"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused_before_a_pod(
    first: AdapterObject, lora: dict[str, Any], said: str
) -> None:
    found = plan(continues(first, **lora))
    assert found.start == ()
    assert condition(only(found), "Completed") == ("True", "Incompatible")
    status = only(found).status
    assert status is not None
    assert status.failure is not None
    assert said in status.failure.message


# --- what was begun with


def begun(**lora: Any) -> ObservedJob:
    """The job once its status names the adapter that it is about to continue."""
    pinning = only(plan(continues(checked(), **lora), session=session(), trainer=trainer()))
    assert pinning.put is None  # the status comes first, so that a new operator sends the same
    return after(pinning)


def test_a_trainer_is_sent_the_adapter_once_the_status_names_it_and_only_what_the_job_itself_asks_for() -> None:
    """The adapter decides rank, alpha and layers; defaults of the base would look like other wishes."""
    assert only(plan(continues(checked()), session=session())).status.initial is None  # type: ignore[union-attr]
    base = tuned(fineTuning={"enabled": True, "defaults": {"rank": 16}})
    sent = only(plan(begun(alpha=6), base=base, session=session(), trainer=trainer())).put
    assert sent is not None
    assert sent.init_from is not None
    assert (sent.init_from.source.uri, sent.init_from.digest) == (checked().spec.source.uri, DIGEST)
    assert (sent.lora.rank, sent.lora.alpha) == (None, 6)
    assert trainer_job(continues(checked()), base) is None


@pytest.mark.parametrize("present", [None, checked(uri="store://team/adapters/other"), adapter("first")])
def test_a_job_goes_on_with_the_adapter_that_it_began_with(present: AdapterObject | None) -> None:
    """Whatever became of the LoraAdapter: a new trainer is sent the same files."""
    resumed = only(plan(replace(begun(), initial=present), session=session(), trainer=trainer(boot_id="other")))
    assert resumed.put is not None
    assert resumed.put.init_from is not None
    assert (resumed.put.init_from.source.uri, resumed.put.init_from.digest) == (checked().spec.source.uri, DIGEST)


def test_a_job_is_refused_when_the_files_of_its_adapter_have_changed_before_it_continues() -> None:
    changed = adapter("first", status={"digest": "sha256:" + "b" * 64, "rank": 8})
    found = plan(replace(begun(), initial=changed))
    assert (found.start, condition(only(found), "Completed")) == ((), ("True", "Incompatible"))
    status = only(found).status
    assert status is not None
    assert status.failure is not None
    assert f"began with LoraAdapter first of spec.initFrom as {DIGEST}" in status.failure.message
    has = plan(replace(begun(), initial=changed), session=session(), trainer=trainer(report()))
    assert only(has).status is None or only(has).status.state == JobState.TRAINING  # type: ignore[union-attr]


def test_the_lineage_of_a_result_names_the_adapter_that_was_continued() -> None:
    made = only(plan(begun(), session=session(), trainer=trainer(trained()))).promote
    assert made is not None
    assert f'"initialDigest": "{DIGEST}"' in made["metadata"]["annotations"]["lorapool.dev/lineage"]
