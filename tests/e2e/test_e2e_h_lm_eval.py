"""lm-eval, unmodified, through the gateway: a fine-tune scores as peft does directly (bases: tests/runtime/serving)."""

from pathlib import Path

import pytest
from e2e_world import World
from lm_eval_kit import ROUTING, assert_equal, harness, real_base, score_by_harness, score_directly

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_the_score_through_the_gateway_is_the_one_that_peft_gives(world: World, tmp_path: Path) -> None:
    harness()
    base = real_base()
    found = score_by_harness(
        f"{world.gateway}/v1", str(world.summary["api_key"]), world.model("routing"), base, tmp_path
    )
    assert_equal(found, score_directly(base, ROUTING))
