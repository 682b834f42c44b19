"""One runtime of the simulation: slots by the runtime's own table and queue, caches, a batch of bounded size."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lorapool_api.common import AdapterKey
from lorapool_runtime.adapters.slot_queue import SlotQueue
from lorapool_runtime.adapters.slot_table import SlotTable

DEVICE, HOST, DISK, SOURCE = "device", "host", "disk", "source"
TIERS = (DEVICE, HOST, DISK, SOURCE)

Later = Callable[[float, Callable[[float], None]], None]
"""Calls a function at a time, with that time."""


@dataclass(frozen=True, slots=True)
class PodSettings:
    slots: int = 32
    host_adapters: int = 256
    """Adapters that fit into host memory."""
    disk_adapters: int = 4096
    """Adapters that fit onto the disk."""
    max_batch: int = 32
    """Requests that are computed at the same time; further ones wait."""
    max_waiting: int = 256
    """Requests that may wait on the pod; it refuses further ones."""
    min_residency_s: float = 1.0
    max_slot_wait_s: float = 30.0
    idle_after_s: float = 300.0
    load_s: float = 0.05
    """From host memory to the device."""
    read_s: float = 0.4
    """From disk to host memory."""
    fetch_s: float = 3.0
    """From the source to disk."""


@dataclass(slots=True)
class Request:
    adapter: int
    key: AdapterKey
    arrived_s: float
    answer_s: float


@dataclass(slots=True)
class Observer:
    """What a pod reports while it works."""

    started: Callable[[Request, float], None]
    """A request begins to be computed."""
    ended: Callable[[Request, float], None]
    loaded: Callable[[Pod, AdapterKey, bool], None]
    """An adapter became usable on the device (True), or left it."""


class Recent:
    """Keys in the order of their last use, bounded in number."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._keys: OrderedDict[AdapterKey, None] = OrderedDict()

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._keys

    def touch(self, key: AdapterKey) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._bound:
            self._keys.popitem(last=False)


@dataclass(slots=True, eq=False)
class Pod:
    uid: str
    settings: PodSettings
    later: Later
    observer: Observer
    asked_s: float
    ready: bool = False
    leaving: bool = False
    gone: bool = False
    in_flight: int = 0
    table: SlotTable = field(init=False)
    queue: SlotQueue = field(init=False)
    host: Recent = field(init=False)
    disk: Recent = field(init=False)
    waiting: dict[AdapterKey, list[Request]] = field(default_factory=dict)
    """Requests by the adapter whose load they wait for."""
    batch: deque[Request] = field(default_factory=deque)
    """Requests that wait until the batch has room."""
    running: int = 0
    _queued: set[AdapterKey] = field(default_factory=set)
    _due_s: float = 0.0
    """When slots are arranged next without another reason."""

    def __post_init__(self) -> None:
        self.table = SlotTable(self.settings.slots)
        self.queue = SlotQueue(self.table, self.settings.min_residency_s, self.settings.max_slot_wait_s)
        self.host = Recent(self.settings.host_adapters)
        self.disk = Recent(self.settings.disk_adapters)

    def accept(self, request: Request, now_s: float) -> str | None:
        """Takes a request and returns the tier in which its adapter was; None: it is full, or has no slot in time."""
        key = request.key
        if self.in_flight >= self.settings.max_batch + self.settings.max_waiting:
            return None
        if self.table.usable(key):
            self.in_flight += 1
            self._admit(request, now_s)
            return DEVICE
        tier = self._tier(key)
        if key not in self.waiting and self.queue.takes_too_long(_always):
            return None
        self.in_flight += 1
        self._want(key, now_s)
        self.waiting[key].append(request)
        return tier

    def preload(self, key: AdapterKey, now_s: float) -> None:
        """Loads an adapter without a request."""
        if not self.table.usable(key):
            self._want(key, now_s)

    def unload_idle(self, now_s: float) -> None:
        """Unloads what was not used for the time after which an adapter counts as idle."""
        for occupant in self.table.occupants():
            if occupant.usable and not occupant.users and now_s - occupant.last_used_s >= self.settings.idle_after_s:
                self._unload(occupant.key)

    # --- loads

    def _tier(self, key: AdapterKey) -> str:
        return HOST if key in self.host else DISK if key in self.disk else SOURCE

    def _want(self, key: AdapterKey, now_s: float) -> None:
        if key in self.waiting:
            return
        self.waiting[key] = []
        if self.table.slot_of(key) is not None:  # it makes room for others, and is loaded again afterwards
            self._join(key, ready=False)
            self._arrange(now_s)
            return
        costs = {HOST: 0.0, DISK: self.settings.read_s, SOURCE: self.settings.read_s + self.settings.fetch_s}
        self.later(now_s + costs[self._tier(key)], partial(self._fetched, key))

    def _fetched(self, key: AdapterKey, now_s: float) -> None:
        self.host.touch(key)
        self.disk.touch(key)
        if not self.gone and key in self.waiting:
            self._join(key, ready=True)
            self._arrange(now_s)

    def _join(self, key: AdapterKey, *, ready: bool) -> None:
        self._queued.add(key)
        self.queue.join(key, ready=ready)

    def _leave(self, key: AdapterKey) -> None:
        self._queued.discard(key)
        self.queue.leave(key)

    def _arrange(self, now_s: float) -> None:
        if self.gone or not self._queued:
            return
        plan = self.queue.plan(now_s, wanted=lambda key: bool(self.waiting.get(key)), may_leave=_always)
        again = False
        for key, slot in plan.grants:
            self.table.allocate(slot, key, now_s)
            self._leave(key)
            self.later(now_s + self.settings.load_s, partial(self._loaded, key))
        for key in plan.staying:
            self.table.stop_drain(key)
            self._leave(key)
            self._admit_waiting(key, now_s)
            again = True
        for key in plan.leaving:
            if self.table.users(key):
                self.table.begin_drain(key)
            else:
                self._unload(key)
                again = True
        if again:
            self._arrange(now_s)
        elif plan.due_s is not None and not now_s < self._due_s <= plan.due_s:
            self._due_s = plan.due_s
            self.later(plan.due_s, self._arrange)

    def _loaded(self, key: AdapterKey, now_s: float) -> None:
        if self.gone:
            return
        self.table.set_loaded(key, now_s)
        self.observer.loaded(self, key, True)
        self._admit_waiting(key, now_s)

    def _unload(self, key: AdapterKey) -> None:
        self.table.begin_unload(key)
        self.table.release(key)
        self.host.touch(key)
        self.observer.loaded(self, key, False)
        if key in self.waiting:
            self._join(key, ready=True)

    # --- requests

    def _admit_waiting(self, key: AdapterKey, now_s: float) -> None:
        for request in self.waiting.pop(key, ()):
            self._admit(request, now_s)

    def _admit(self, request: Request, now_s: float) -> None:
        self.table.enter(request.key, now_s)
        if self.running < self.settings.max_batch:
            self._run(request, now_s)
        else:
            self.batch.append(request)

    def _run(self, request: Request, now_s: float) -> None:
        self.running += 1
        self.observer.started(request, now_s)
        self.later(now_s + request.answer_s, partial(self._done, request))

    def _done(self, request: Request, now_s: float) -> None:
        if self.gone:
            return
        self.running -= 1
        self.in_flight -= 1
        key = request.key
        self.table.leave(key, now_s)
        self.observer.ended(request, now_s)
        if self.batch:
            self._run(self.batch.popleft(), now_s)
        if self.table.draining(key) and not self.table.users(key):
            self._unload(key)
        self._arrange(now_s)


def _always(_: AdapterKey) -> bool:
    return True
