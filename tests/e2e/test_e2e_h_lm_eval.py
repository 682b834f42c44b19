"""lm-eval, unmodified, through the gateway: base and a fine-tune score as transformers and peft do directly."""

from pathlib import Path

import pytest
from e2e_world import BASE, World
from lm_eval_kit import ROUTING, assert_equal, harness, real_base, score_by_harness, score_directly

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("adapter", [None, ROUTING])
def test_the_score_through_the_gateway_is_the_one_that_transformers_gives(
    world: World, tmp_path: Path, adapter: Path | None
) -> None:
    harness()
    base = real_base()
    model = world.model(BASE if adapter is None else "routing")
    found = score_by_harness(f"{world.gateway}/v1", str(world.summary["api_key"]), model, base, tmp_path)
    assert_equal(found, score_directly(base, adapter))
