"""W6 splits a wait into parts by the watch's reports, and is "not run" without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
import scale_to_zero
from scale_to_zero import JsonStream, Seen, measure, records_of, wait_of


def pod(*, running: bool = False, ready: bool = False, leaving: bool = False) -> dict[str, Any]:
    status: dict[str, Any] = {"conditions": [{"type": "Ready", "status": str(ready)}]}
    if running:
        status["containerStatuses"] = [{"state": {"running": {}}}]
    return {"kind": "Pod", "metadata": {"deletionTimestamp": "now"} if leaving else {}, "status": status}


def seen(*reported: tuple[float, dict[str, Any]]) -> Seen:
    made = Seen()
    for at_s, one in reported:
        made.note(one, at_s)
    return made


STORY = ((10.3, pod()), (11.0, pod()), (12.0, pod(running=True)), (20.0, pod(running=True, ready=True)))


def test_the_platforms_own_part_is_what_lies_before_the_pod_and_after_its_readiness() -> None:
    wait = wait_of(10.0, seen(*STORY), 20.25)
    assert wait.answer == pytest.approx(10.25)
    assert (wait.wake, wait.pod_start, wait.model_load) == pytest.approx((0.3, 1.7, 8.0))
    assert wait.own == pytest.approx(0.55)
    records = {record.name: record for record in records_of([wait])}
    assert records["w6.own_ms"].value == pytest.approx(550)
    assert records["w6.own_ms"].note.startswith("5.4%")


def test_an_answer_before_the_watch_told_of_readiness_is_no_time_won() -> None:
    wait = wait_of(10.0, seen(*STORY), 19.9)
    assert wait.after_ready == pytest.approx(-0.1)
    assert wait.own == pytest.approx(0.3)


def test_the_first_telling_counts_and_a_pod_that_leaves_says_nothing() -> None:
    reported = seen((5.0, pod(running=True, ready=True, leaving=True)), *STORY, (30.0, pod(running=True, ready=True)))
    assert (reported.created_s, reported.running_s, reported.ready_s) == (10.3, 12.0, 20.0)


def test_a_story_with_its_end_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="not seen to start"):
        wait_of(10.0, seen(*STORY[:3]), 20.0)


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_documents_that_follow_each_other_are_parsed_however_they_are_cut(cut: int) -> None:
    documents = [pod(), pod(ready=True), {"kind": "List", "items": []}]
    text = "\n".join(json.dumps(document, indent=1) for document in documents) + "\n"
    stream, found = JsonStream(), []
    for at in range(0, len(text), cut):
        found += list(stream.feed(text[at : at + cut]))
    assert found == documents


def test_without_a_demo_every_record_says_so(tmp_path: Path) -> None:
    records = measure(tmp_path / "summary.json", 3)
    assert [record.name for record in records] == list(scale_to_zero.RECORDS)
    assert {record.note for record in records} == {scale_to_zero.NO_CLUSTER}


def test_with_a_summary_of_a_cluster_that_is_gone_every_record_says_so(tmp_path: Path) -> None:
    summary = {
        "kubectl": str(tmp_path / "no-kubectl"),
        "kubeconfig": "",
        "namespace": "lorapool",
        "gateway_url": "",
        "api_key": "",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert {record.note for record in measure(tmp_path / "summary.json", 3)} == {scale_to_zero.NO_CLUSTER}
