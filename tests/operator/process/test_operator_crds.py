"""The API server refuses bad objects by the committed CRDs: bounds, schemes, immutability."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import Api, RefusedError

pytestmark = pytest.mark.apiserver


async def refused(attempt: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        await attempt
    assert caught.value.status == 422
    return caught.value.message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": {"uri": "https://host/model"}}, "source.uri must start with hf://, oci://, s3:// or pvc://"),
        ({"source": {"uri": "store://models/a"}}, "source.uri must start with hf://, oci://, s3:// or pvc://"),
        ({"scaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas must not exceed scaling.maxReplicas"),
        ({"lora": {"maxRank": 0}}, "should be greater than or equal to 1"),
        ({"lora": {"slots": 5000}}, "should be less than or equal to 1024"),
        ({"maxModelLen": 1}, "should be greater than or equal to 16"),
        ({"scaling": {"idleAfter": "soon"}}, "should match"),
        ({"access": {"namespaces": ["*"]}}, "should match"),
        ({"fineTuning": {"maxRank": 32}}, "fineTuning.maxRank must not exceed lora.maxRank"),
        ({"fineTuning": {"defaults": {"learningRate": "0.0"}}}, "learningRate must be above 0"),
        ({"fineTuning": {"defaults": {"learningRate": "NaN"}}}, "should match"),
    ],
)
async def test_a_bad_base_is_refused_with_the_field_and_the_bound(api: Api, spec: dict[str, Any], message: str) -> None:
    assert message in await refused(api.base(**spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"source": {"uri": "file:///etc/passwd"}},
            "source.uri must start with hf://, oci://, s3://, pvc:// or store://",
        ),
        ({"source": {"uri": "hf://org/a", "digest": "sha256:short"}}, "should match"),
        ({"minReplicas": 3, "maxReplicas": 2}, "minReplicas must not exceed maxReplicas"),
        ({"idleAfter": "5 minutes"}, "should match"),
        ({"alias": "with space"}, "should match"),
    ],
)
async def test_a_bad_adapter_is_refused_with_the_field_and_the_bound(
    api: Api, spec: dict[str, Any], message: str
) -> None:
    assert message in await refused(api.adapter("a", **spec))


DATA = {"training": {"uri": "store://team-a/files/file-1"}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"data": DATA}, "promotion.policy Gated needs data.validation or data.validationFraction"),
        ({"data": {"training": {"uri": "s3://bucket/file"}}}, "should match"),
        ({"data": {**DATA, "validationFraction": "0.95"}}, "data.validationFraction must be below 0.9"),
        (
            {"data": {**DATA, "validationFraction": "0.1", "validation": {"uri": "store://team-a/files/file-2"}}},
            "data takes validation or validationFraction, not both",
        ),
        ({"training": {"epochs": 51}}, "should be less than or equal to 50"),
        ({"training": {"batchSize": 257}}, "should be less than or equal to 256"),
        ({"training": {"learningRate": "0"}}, "training.learningRate must be above 0"),
        ({"training": {"learningRate": "-1"}}, "should match"),
        ({"training": {"learningRate": "1e99999"}}, "should match"),
        ({"training": {"warmup": "1"}}, "training.warmup is a share of the steps and must be below 1"),
        ({"lora": {"dropout": "1.5"}}, "lora.dropout must be below 1"),
        ({"lora": {"rank": 0}}, "should be greater than or equal to 1"),
        ({"output": {"suffix": "a:b"}}, "should match"),
        ({"output": {"suffix": "a\nb"}}, "should match"),
        ({"output": {"suffix": "s" * 65}}, "Too long"),
        ({"run": "Again"}, "Unsupported value"),
        ({"method": "Reinforcement"}, "Unsupported value"),
    ],
)
async def test_a_bad_job_is_refused_with_the_field_and_the_bound(api: Api, spec: dict[str, Any], message: str) -> None:
    assert message in await refused(api.tuning("j", **spec))


@pytest.mark.parametrize(
    "change",
    [
        {"baseModelRef": {"name": "other"}},
        {"initFrom": {"name": "other"}},
        {"data": {"training": {"digest": "sha256:" + "0" * 64}}},
        {"lora": {"rank": 4}},
        {"training": {"seed": 8}},
        {"checkpoints": {"keep": 1}},
        {"promotion": {"policy": "Always"}},
        {"output": {"suffix": "other"}},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_what_a_job_trains_cannot_be_changed(api: Api, change: dict[str, Any]) -> None:
    await api.tuning("j")
    field = next(iter(change))
    assert f"{field} is immutable" in await refused(api.patch("finetunejobs", "j", {"spec": change}))


async def test_a_job_can_be_paused_and_continued_and_a_cancelled_one_stays_cancelled(api: Api) -> None:
    await api.tuning("j")
    for run in ("Paused", "Run", "Cancelled"):
        changed = await api.patch("finetunejobs", "j", {"spec": {"run": run, "priority": 10, "activeDeadline": "1h"}})
        assert changed["spec"]["run"] == run
    for run in ("Run", "Paused", None):
        assert "run: Cancelled is final" in await refused(api.patch("finetunejobs", "j", {"spec": {"run": run}}))


async def test_a_job_has_the_documented_defaults(api: Api) -> None:
    spec = (await api.tuning("j"))["spec"]
    assert (spec["lora"], spec["training"]["seed"], spec["promotion"]) == (
        {"dropout": "0", "targetModules": ["all-linear"]},
        7,
        {"policy": "Gated", "minImprovement": "0"},
    )
    assert (spec["run"], spec["priority"], spec["checkpoints"]) == ("Run", 50, {"every": "10m", "keep": 3})


async def test_names_that_no_child_could_have_are_refused(api: Api) -> None:
    await refused(api.base("b" * 41))
    await refused(api.adapter("with.dots"))
    await refused(api.adapter("a" * 64))
    await refused(api.tuning("with.dots"))


async def test_immutable_fields_cannot_be_changed(api: Api) -> None:
    await api.base()
    await api.adapter("a")
    change = {"spec": {"source": {"uri": "hf://org/other"}}}
    assert "source is immutable" in await refused(api.patch("basemodels", "tiny", change))
    assert "baseModelRef is immutable" in await refused(
        api.patch("loraadapters", "a", {"spec": {"baseModelRef": {"name": "other"}}})
    )
    await api.patch("loraadapters", "a", change)  # an adapter's source may change: that is a rollout


async def test_the_scale_subresource_reads_and_writes_replicas(api: Api) -> None:
    await api.base(scaling={"maxReplicas": 2})
    answer = await api.patch("basemodels", "tiny", {"spec": {"replicas": 2}}, sub="scale")
    assert answer["kind"] == "Scale"
    assert (await api.get("basemodels", "tiny"))["spec"]["replicas"] == 2


async def test_the_largest_number_of_replicas_can_be_lowered_under_load(api: Api) -> None:
    await api.base(scaling={"maxReplicas": 4})
    await api.patch("basemodels", "tiny", {"spec": {"replicas": 4}}, sub="scale")
    await api.patch("basemodels", "tiny", {"spec": {"scaling": {"maxReplicas": 2}}})
    assert (await api.get("basemodels", "tiny"))["spec"]["scaling"]["maxReplicas"] == 2
