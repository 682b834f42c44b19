"""Ends the responses that wait for a pod that is lost, so that its requests are sent elsewhere or answered.

A pod that answers its polls may take as long as it needs, for a load or a full queue. When a pod leaves the table, or
its poll fails, a response that has not begun is ended at once. One that has begun, and any of a pod that answers no
poll, is ended after SILENCE_S without a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakSet

from lorapool_gateway.requests.http_response import ConnectionLostError, HttpResponse
from lorapool_gateway.routing.routes import RouteTable, RuntimeReplica

SILENCE_S = 10.0


class PodLostError(ConnectionLostError):
    """The pod has left the table or its poll failed before the response began."""


@dataclass(slots=True)
class _Pod:
    lost: bool
    answers: bool
    responses: WeakSet[HttpResponse] = field(default_factory=WeakSet)


class PodWatch:
    def __init__(self, read_timeout_s: float) -> None:
        """`read_timeout_s`: how long a response of a pod that answers its polls may be silent."""
        self._read_timeout_s = read_timeout_s
        self._pods: dict[str, _Pod] = {}

    def add(self, replica: RuntimeReplica, response: HttpResponse) -> None:
        """Watches the response from now on."""
        pod = self._pods.get(replica.endpoint.pod_uid)
        if pod is None:
            pod = self._pods[replica.endpoint.pod_uid] = _Pod(_is_lost(replica), _answers(replica))
        pod.responses.add(response)
        if not pod.answers:
            response.limit_silence(SILENCE_S)

    def answers(self, pod_uid: str) -> bool:
        """Whether the pod answered its last poll, so that its silence alone does not show that it is lost."""
        pod = self._pods.get(pod_uid)
        return pod is not None and pod.answers

    def follow(self, table: RouteTable) -> None:
        """Takes over the state of the pods from a new table."""
        if not self._pods:
            return
        replicas = {each.endpoint.pod_uid: each for group in table.replicas.values() for each in group}
        for pod_uid, pod in list(self._pods.items()):
            if pod.responses:
                self._update(pod, replicas.get(pod_uid))
            else:
                del self._pods[pod_uid]

    def _update(self, pod: _Pod, replica: RuntimeReplica | None) -> None:
        was_lost, answered = pod.lost, pod.answers
        pod.lost, pod.answers = _is_lost(replica), _answers(replica)
        for response in list(pod.responses):
            if pod.lost and not was_lost and not response.has_begun:
                response.end(PodLostError("the pod is lost"))
            elif pod.answers != answered:
                response.limit_silence(self._read_timeout_s if pod.answers else SILENCE_S)


def _is_lost(replica: RuntimeReplica | None) -> bool:
    return replica is None or replica.poll_failed


def _answers(replica: RuntimeReplica | None) -> bool:
    """True also for a pod that terminates, which is not polled any more."""
    return (
        replica is not None and not replica.poll_failed and (replica.state is not None or replica.endpoint.terminating)
    )
