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
        ({"scaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas must not exceed scaling.maxReplicas"),
        ({"lora": {"maxRank": 0}}, "should be greater than or equal to 1"),
        ({"lora": {"slots": 5000}}, "should be less than or equal to 1024"),
        ({"maxModelLen": 1}, "should be greater than or equal to 16"),
        ({"scaling": {"idleAfter": "soon"}}, "should match"),
        ({"access": {"namespaces": ["*"]}}, "should match"),
    ],
)
async def test_a_bad_base_is_refused_with_the_field_and_the_bound(api: Api, spec: dict[str, Any], message: str) -> None:
    assert message in await refused(api.base(**spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": {"uri": "file:///etc/passwd"}}, "source.uri must start with hf://, oci://, s3:// or pvc://"),
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


async def test_names_that_no_child_could_have_are_refused(api: Api) -> None:
    await refused(api.base("b" * 41))
    await refused(api.adapter("with.dots"))
    await refused(api.adapter("a" * 64))


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
