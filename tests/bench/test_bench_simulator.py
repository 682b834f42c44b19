"""The simulator: the product's own decisions, a small fleet, and the same choice of a pod as the gateways make."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from simulator.fleet import BaseSimulation, Plan
from simulator.pod import DEVICE, SOURCE, Pod, PodSettings
from simulator.report import add_up, figures, line_chart, plots, table, wait_below_s
from simulator.traffic import Burst, Traffic

from lorapool_api.basemodel import BaseModelSpec
from lorapool_gateway.routing.objects import Endpoint, ObjectRef, RuntimeState, adapter_route, base_route
from lorapool_gateway.routing.pick import candidates
from lorapool_gateway.routing.routes import RuntimeReplica, Target


def plan(*, seconds: float = 900.0, per_s: float = 4.0, adapters: int = 200, **more: Any) -> Plan:
    scaling = {"maxReplicas": 6, "targetInFlight": 8, "idleAfter": "2m", "scaleDownDelay": "30s"}
    spec = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, "scaling": scaling})
    traffic = Traffic(adapters, per_s, answer_s=4.0, bursts=more.pop("bursts", ()))
    pod = PodSettings(slots=16, host_adapters=64)
    return replace(Plan(spec=spec, traffic=traffic, pod=pod, seconds=seconds, start_s=30.0), **more)


def test_a_small_fleet_answers_every_request_and_the_figures_add_up() -> None:
    simulation = BaseSimulation(plan(losses=((450.0, 0.3),)))
    result = simulation.run()
    total = add_up([result])
    requests = sum(item.requests for item in total)
    started = sum(sum(item.waits) for item in total)
    assert 1000 < requests < 3000
    assert requests - 60 < started <= requests
    tiers = sum((item.tiers for item in total), start=type(total[0].tiers)())
    assert tiers[DEVICE] > tiers[SOURCE] > 0
    text = table(figures([result], 200, 30.0))
    assert f"{requests:,} for" in text
    assert set(plots(total)) == {"load", "tiers", "waits", "spread"}


def test_an_idle_fleet_goes_to_zero_and_the_next_burst_wakes_as_many_pods_as_it_fills() -> None:
    burst = Burst(start_s=0.0, seconds=20.0, adapter=3, per_s=10.0)
    simulation = BaseSimulation(plan(per_s=0.0, bursts=(burst,), seconds=29.0))
    simulation.run()
    assert simulation.slices[0].cold_requests > 100
    assert simulation.slices[0].pod_starts == simulation.replicas == 6
    asleep = BaseSimulation(plan(per_s=0.0, bursts=(burst,), seconds=400.0))
    asleep.run()
    assert asleep.replicas == 0


def test_spreading_keeps_a_hot_adapter_from_filling_one_pod() -> None:
    burst = Burst(start_s=200.0, seconds=500.0, adapter=150, per_s=8.0)
    spread = BaseSimulation(plan(bursts=(burst,))).run()
    one_home = BaseSimulation(plan(bursts=(burst,), spreading=False)).run()
    assert max(item.spread_adapters for item in spread.slices) >= 1
    late = [wait_below_s(_sum_waits(result.slices), 0.9) for result in (spread, one_home)]
    assert late[0] < late[1]


def _sum_waits(slices: list[Any]) -> list[int]:
    return [sum(column) for column in zip(*(item.waits for item in slices), strict=True)]


def test_the_same_seed_gives_the_same_day() -> None:
    assert BaseSimulation(plan()).run() == BaseSimulation(plan()).run()


@pytest.mark.parametrize("seed", range(20))
def test_the_simulated_gateway_chooses_as_the_real_one_does(seed: int) -> None:
    rng = random.Random(seed)
    simulation = BaseSimulation(plan(seed=seed))
    for number in range(5):
        simulation._start(number, 0.0)
        pod = simulation._pods[number]
        assert isinstance(pod, Pod)
        pod.ready, pod.in_flight = rng.random() < 0.8, rng.randrange(30)
        if rng.random() < 0.5:
            simulation._loaded.setdefault(simulation._key(7), []).append(pod)
    simulation._k[7] = rng.choice([1, 2, 3])
    pods = [pod for pod in simulation._pods if pod is not None]
    key = simulation._key(7)
    raw = {"metadata": {"namespace": "n", "name": "x", "uid": key.uid}}
    spec = {"baseModelRef": {"name": "b"}, "source": {"uri": "hf://org/x"}}
    adapter = replace(adapter_route({**raw, "spec": spec}), preferred_replicas=simulation._k[7])
    base = base_route(
        {"metadata": {"namespace": "n", "name": "b", "uid": "b"}, "spec": {"source": {"uri": "hf://o/b"}}}
    )
    replicas = []
    for pod in pods:
        loaded = pod in simulation._loaded.get(key, [])
        held = frozenset({(key.uid, key.digest)}) if loaded else frozenset()
        state = RuntimeState("boot", ready=pod.ready, draining=False, in_flight=pod.in_flight, loaded=held)
        endpoint = Endpoint(ObjectRef("n", "b"), "base", pod.uid, pod.uid, "http://x", ready=True, terminating=False)
        replicas.append(RuntimeReplica(endpoint, state, proven=True))
    wanted = [item.endpoint.pod_uid for item in candidates(Target(base, adapter, key.digest), replicas, {})]
    assert [pod.uid for pod in simulation.choose(7)] == wanted


def test_a_picture_is_the_same_for_the_same_values() -> None:
    values = {"a": [1.0, 2.0], "b": [0.0, 30.0]}
    assert line_chart("x", values) == line_chart("x", values)
    assert "polyline" in line_chart("x", values)
