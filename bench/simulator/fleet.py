"""One base of the simulation: its pods, the gateways that choose among them, the operator's decisions each second."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import TypeVar

import numpy as np

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import AdapterKey, duration_s
from lorapool_api.placement import Replica, placement_order
from lorapool_gateway.requests.wake import more_replicas
from lorapool_gateway.routing.objects import BaseRoute, ObjectRef
from lorapool_operator.decisions import spread
from lorapool_operator.decisions.scaling import scale
from lorapool_operator.world.observed import ScaleMemory, SpreadMemory
from simulator.pod import Observer, Pod, PodSettings, Request
from simulator.traffic import Traffic

TRIES = 3
RETRY_S = 0.4
SLICE_S = 600.0
"""Length of one point of the plots."""
WAIT_EDGES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0)
DEDICATED_IDLE_S = 600.0
"""A deployment of its own for one fine-tune stops when idle for this long, as a base does."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one base is, and what happens to it."""

    spec: BaseModelSpec
    traffic: Traffic
    pod: PodSettings
    seconds: float
    start_s: float
    """From the decision to start a pod to its first answer."""
    losses: tuple[tuple[float, float], ...] = ()
    """(time, share of the pods that is lost)."""
    seed: int = 0
    spreading: bool = True
    """False: every adapter has one preferred replica, to compare with."""


@dataclass(slots=True)
class Slice:
    """What was counted in one interval of SLICE_S."""

    requests: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    waits: list[int] = field(default_factory=lambda: [0] * (len(WAIT_EDGES_S) + 1))
    """Requests by how long they waited: bounds are WAIT_EDGES_S."""
    pod_s: float = 0.0
    moves: int = 0
    loads: int = 0
    pod_starts: int = 0
    cold_requests: int = 0
    """Requests that waited for the start of a pod."""
    refused: int = 0
    lost: int = 0
    """Requests that were running on a pod when it was lost; gateways send those that had no answer yet again."""
    busiest: int = 0
    """Most requests in flight on one pod."""
    mean_in_flight: float = 0.0
    spread_adapters: int = 0


@dataclass(slots=True)
class Result:
    slices: list[Slice]
    adapters_used: int
    dedicated_s: float
    """GPU time of one deployment per fine-tune that also scales to zero."""


class BaseSimulation:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._rng = np.random.default_rng(plan.seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self._uids = [f"pod-{plan.seed}-{number}" for number in range(plan.spec.scaling.max_replicas)]
        self._pods: list[Pod | None] = [None] * len(self._uids)
        self._leaving: list[Pod] = []
        self._orders: dict[int, array[int]] = {}
        self._keys: dict[int, AdapterKey] = {}
        self._loaded: dict[AdapterKey, list[Pod]] = {}
        self._last_pod: dict[AdapterKey, str] = {}
        self._requests_of: Counter[int] = Counter()
        self._k: dict[int, int] = {}
        self._spread_memory: dict[int, SpreadMemory] = {}
        self._held: list[Request] = []
        self._share = 0
        self.replicas = 0
        self._memory = ScaleMemory()
        self._asked_s = self._active_s = 0.0
        self._dedicated: dict[int, float] = {}
        self._dedicated_s = 0.0
        self.slices: list[Slice] = []
        self._observer = Observer(self._started, self._ended, self._note_loaded)

    def run(self) -> Result:
        for at_s, share in self.plan.losses:
            self._later(at_s, partial(self._lose, share))
        self._later(0.0, self._tick)
        for times, adapters, durations in self.plan.traffic.arrivals(self.plan.seconds, self._rng):
            for at_s, adapter, answer_s in zip(times, adapters, durations, strict=True):
                self._advance(at_s)
                self._arrive(Request(adapter, self._key(adapter), at_s, answer_s), at_s)
        self._advance(self.plan.seconds)
        return Result(self.slices, len(self._dedicated), self._dedicated_s)

    # --- time

    def _later(self, at_s: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), call))

    def _advance(self, to_s: float) -> None:
        events = self._events
        while events and events[0][0] <= to_s:
            at_s, _, call = heapq.heappop(events)
            call(at_s)

    def _slice(self, now_s: float) -> Slice:
        number = int(now_s // SLICE_S)
        while len(self.slices) <= number:
            self.slices.append(Slice())
        return self.slices[number]

    # --- the gateways

    def _key(self, adapter: int) -> AdapterKey:
        key = self._keys.get(adapter)
        if key is None:
            key = self._keys[adapter] = AdapterKey(f"{self.plan.seed}-{adapter}", "sha256")
        return key

    def order(self, adapter: int) -> Iterator[Pod]:
        """The pods that serve, in the adapter's placement order."""
        order = self._orders.get(adapter)
        if order is None:
            number = {uid: at for at, uid in enumerate(self._uids)}
            names = placement_order(self._key(adapter).uid, [Replica(uid) for uid in self._uids])
            order = self._orders[adapter] = array("H", [number[name] for name in names])
        return (pod for at in order if (pod := self._pods[at]) is not None and pod.ready and not pod.leaving)

    def choose(self, adapter: int) -> Iterator[Pod]:
        """Yields the pods to try, best first, as the gateways' `pick` orders them."""
        loaded = [pod for pod in self._loaded.get(self._key(adapter), ()) if pod.ready and not pod.leaving]
        if len(loaded) > 1:
            order = list(self.order(adapter))
            preferred = order[: self._k.get(adapter, 1)]
            home = [pod for pod in preferred if pod in loaded]
            others = [pod for pod in order if pod in loaded and pod not in preferred]
            yield from sorted(home, key=lambda pod: pod.in_flight)
            yield from sorted(others, key=lambda pod: pod.in_flight)
        else:
            yield from loaded
        yield from (pod for pod in self.order(adapter) if pod not in loaded)

    def _arrive(self, request: Request, now_s: float) -> None:
        self._slice(now_s).requests += 1
        self._active_s = now_s
        until_s = self._dedicated.get(request.adapter, 0.0)
        ends_s = now_s + request.answer_s + DEDICATED_IDLE_S
        started_s = now_s if now_s < until_s else now_s - self.plan.start_s
        self._dedicated_s += max(0.0, ends_s - max(started_s, until_s))
        self._dedicated[request.adapter] = max(until_s, ends_s)
        self._dispatch(request, now_s)

    def _dispatch(self, request: Request, now_s: float) -> None:
        tried = False
        for pod in islice(self.choose(request.adapter), TRIES):
            tried = True
            tier = pod.accept(request, now_s)
            if tier is not None:
                self._slice(now_s).tiers[tier] += 1
                self._requests_of[request.adapter] += 1
                return
        if not tried:
            self._hold(request, now_s)
            return
        self._slice(now_s).refused += 1
        self._later(now_s + RETRY_S, partial(self._dispatch, request))

    def _hold(self, request: Request, now_s: float) -> None:
        self._held.append(request)
        self._slice(now_s).cold_requests += 1
        spec = self.plan.spec.model_copy(update={"replicas": self.replicas})
        base = BaseRoute(ObjectRef("sim", "base"), "base", 0.0, spec, 300.0, 10**9)
        add = more_replicas(base, len(self._held), self._share)
        if self.replicas == 0 or add:
            self._share = max(1, self._share + add)
            self._set_replicas(max(1, self.replicas + add), now_s)

    # --- what pods report

    def _started(self, request: Request, now_s: float) -> None:
        waited_s = now_s - request.arrived_s
        place = 0
        while place < len(WAIT_EDGES_S) and waited_s > WAIT_EDGES_S[place]:
            place += 1
        self._slice(now_s).waits[place] += 1

    def _ended(self, request: Request, now_s: float) -> None:
        self._active_s = now_s
        self._fewer(request.adapter, 1)

    def _fewer(self, adapter: int, requests: int) -> None:
        self._requests_of[adapter] -= requests
        if not self._requests_of[adapter]:
            del self._requests_of[adapter]

    def _note_loaded(self, pod: Pod, key: AdapterKey, usable: bool) -> None:
        if not usable:
            self._forget(pod, key)
            return
        self._loaded.setdefault(key, []).append(pod)
        here = self.slices[-1]
        here.loads += 1
        here.moves += self._last_pod.get(key, pod.uid) != pod.uid
        self._last_pod[key] = pod.uid

    def _forget(self, pod: Pod, key: AdapterKey) -> None:
        pods = self._loaded[key]
        pods.remove(pod)
        if not pods:
            del self._loaded[key]

    # --- the operator

    def _tick(self, now_s: float) -> None:
        pods = [pod for pod in self._pods if pod is not None]
        ready = [pod for pod in pods if pod.ready]
        here = self._slice(now_s)
        here.pod_s += len(pods) + len(self._leaving)
        load = scale.Load(
            in_flight=sum(pod.in_flight for pod in ready),
            silent=0,
            ready=len(ready),
            last_activity_unix_s=self._active_s,
            asked_unix_s=self._asked_s,
        )
        here.busiest = max(here.busiest, max((pod.in_flight for pod in ready), default=0))
        here.mean_in_flight += load.in_flight / max(1, len(ready)) / SLICE_S
        made = scale.decide(
            self.replicas,
            self.plan.spec.scaling,
            load,
            self._memory,
            floor=0,
            now=now_s,
            start_allowance_s=10 * self.plan.start_s,
        )
        self._memory = made.memory
        if made.replicas != self.replicas:
            self._set_replicas(made.replicas, now_s)
        if self.plan.spreading:
            self._spread(len(ready), now_s)
        here.spread_adapters = max(here.spread_adapters, len(self._k))
        if int(now_s) % 30 == 0:
            for pod in ready:
                pod.unload_idle(now_s)
        self._leaving = [pod for pod in self._leaving if pod.in_flight]
        if now_s + 1.0 < self.plan.seconds:
            self._later(now_s + 1.0, self._tick)

    def _spread(self, ready: int, now_s: float) -> None:
        scaling = self.plan.spec.scaling
        target = scaling.target_in_flight
        hot = {adapter for adapter, requests in self._requests_of.items() if requests > target}
        for adapter in hot | self._k.keys() | self._spread_memory.keys():
            made = spread.decide(
                self._k.get(adapter, 1),
                self._requests_of.get(adapter, 0),
                lowest=1,
                highest=ready,
                target=target,
                down_delay_s=duration_s(scaling.scale_down_delay),
                memory=self._spread_memory.get(adapter, SpreadMemory()),
                now=now_s,
            )
            _keep(self._spread_memory, adapter, made.memory, SpreadMemory())
            if made.k > self._k.get(adapter, 1):
                for pod in islice(self.order(adapter), made.k):
                    pod.preload(self._key(adapter), now_s)
            _keep(self._k, adapter, made.k, 1)

    def _set_replicas(self, replicas: int, now_s: float) -> None:
        self.replicas = replicas
        running = [pod for pod in self._pods if pod is not None]
        if replicas > len(running):
            self._asked_s = now_s
            for number in [at for at, pod in enumerate(self._pods) if pod is None][: replicas - len(running)]:
                self._start(number, now_s)
        for pod in sorted(running, key=lambda pod: (pod.ready, pod.in_flight))[: max(0, len(running) - replicas)]:
            self._remove(pod, now_s)
            self._leaving.append(pod)
        if replicas == 0:
            self._share = 0

    def _start(self, number: int, now_s: float) -> None:
        pod = Pod(self._uids[number], self.plan.pod, self._later, self._observer, now_s)
        self._pods[number] = pod
        self._slice(now_s).pod_starts += 1
        start_s = self.plan.start_s * (0.8 + 0.4 * float(self._rng.random()))
        self._later(now_s + start_s, partial(self._ready, pod))

    def _ready(self, pod: Pod, now_s: float) -> None:
        if pod.gone or pod.leaving:
            return
        pod.ready = True
        held, self._held = self._held, []
        for request in held:
            self._dispatch(request, now_s)

    def _remove(self, pod: Pod, now_s: float) -> None:
        """Takes a pod out of service; it ends when its last request has ended."""
        pod.leaving = True
        self._pods[self._uids.index(pod.uid)] = None

    def _lose(self, share: float, now_s: float) -> None:
        """Ends a share of the pods at once; the Deployment starts as many again."""
        running = [pod for pod in self._pods if pod is not None and pod.ready]
        count = int(np.ceil(share * len(running)))
        for at in self._rng.permutation(len(running))[:count]:
            pod = running[at]
            pod.gone = True
            for occupant in pod.table.occupants():
                if occupant.loaded:
                    self._forget(pod, occupant.key)
                if occupant.users:
                    self._fewer(adapter_of(occupant.key), occupant.users)
            number = self._uids.index(pod.uid)
            self._pods[number] = None
            self._start(number, now_s)
            self._again(pod, now_s)

    def _again(self, pod: Pod, now_s: float) -> None:
        """Requests that had not begun go to another pod; those that were being answered are lost."""
        self._slice(now_s).lost += pod.running
        unloaded = [request for requests in pod.waiting.values() for request in requests]
        for request in unloaded:
            self._fewer(request.adapter, 1)
        for request in (*pod.batch, *unloaded):
            self._dispatch(request, now_s)


def adapter_of(key: AdapterKey) -> int:
    return int(key.uid.rpartition("-")[2])


T = TypeVar("T")


def _keep(kept: dict[int, T], adapter: int, value: T, default: T) -> None:
    if value == default:
        kept.pop(adapter, None)
    else:
        kept[adapter] = value
