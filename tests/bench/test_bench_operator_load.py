"""The operator with a whole fleet: what it writes, how long its loop pauses, how much memory it takes."""

from __future__ import annotations

import pytest
from operator_load import EDITS, measure

pytestmark = pytest.mark.apiserver


def test_a_restart_and_an_edit_cost_no_write_too_many() -> None:
    figures = measure(adapters=150, pods=2, reports=60)
    assert figures["operator.first_writes_per_adapter"] >= 1
    assert figures["operator.restart_status_writes"] == 0
    assert figures["operator.restart_loads"] == 0
    assert figures["operator.restart_moves"] == 0
    assert figures["operator.writes_per_edit"] == 1
    assert EDITS < 150 - 32  # the edited adapters exist and are not pinned


@pytest.mark.deep
def test_ten_thousand_adapters_on_sixteen_pods_cost_no_write_too_many() -> None:
    figures = measure(adapters=10_000, pods=16, reports=2_000)
    assert figures["operator.memory_mib"] < 200
    assert figures["operator.restart_status_writes"] == 0
    assert figures["operator.restart_loads"] == figures["operator.restart_moves"] == 0
    assert figures["operator.writes_per_edit"] == 1
