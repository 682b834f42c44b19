"""The state of one adapter slot. Pure: it holds references and numbers and runs no torch operator.

    EMPTY --fill--> FILLED --publish--> PUBLISHED
      ^               | ^                   |
      +----release----+ +-----withdraw------+          fill replaces the contents of a FILLED slot

Requests reach the weights of a PUBLISHED slot only, and only its contents must not change. An illegal move raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lorapool_runtime.engines.torch.lora.slot_memory import PackedWeights, Placement
from lorapool_runtime.weights.layout import Layout


class SlotStatus(StrEnum):
    EMPTY = "empty"
    FILLED = "filled"
    PUBLISHED = "published"


class IllegalSlotMoveError(RuntimeError):
    """A slot was asked for a move that its status does not allow: a fault of the caller, never of a client."""


class WrongWeightsError(Exception):
    """The slot does not hold the weights that a request was made for."""


@dataclass(frozen=True, slots=True)
class SlotContents:
    """An adapter in a slot."""

    layout: Layout
    placement: Placement


class SlotState:
    """`AdapterSlots` owns one per slot. Only the engine thread publishes and withdraws it."""

    __slots__ = ("_contents", "number", "salt", "status")

    def __init__(self, number: int) -> None:
        self.number = number
        self.status = SlotStatus.EMPTY
        self.salt: str | None = None
        """Identity of the published weights, taken from the first request on them."""
        self._contents: SlotContents | None = None

    @property
    def contents(self) -> SlotContents:
        """The adapter in the slot. Raises IllegalSlotMoveError where there is none."""
        if self._contents is None:
            raise IllegalSlotMoveError(f"slot {self.number} is empty")
        return self._contents

    @property
    def resident_bytes(self) -> int:
        """Bytes that the slot's adapter occupied when it was filled in; 0 for an empty slot."""
        return 0 if self._contents is None else self._contents.placement.resident_bytes

    def require_unpublished(self) -> None:
        """Raises IllegalSlotMoveError where requests can reach the slot."""
        if self.status is SlotStatus.PUBLISHED:
            raise IllegalSlotMoveError(f"slot {self.number} is published: withdraw it first")

    def fill(self, contents: SlotContents) -> None:
        self.require_unpublished()
        self._contents, self.status = contents, SlotStatus.FILLED

    def publish(self) -> None:
        if self.status is not SlotStatus.FILLED:
            raise IllegalSlotMoveError(f"slot {self.number} is {self.status}: only a filled slot can be published")
        self.status = SlotStatus.PUBLISHED

    def withdraw(self) -> None:
        """Leaves the contents in place. A slot that is not published stays as it is."""
        self.salt = None
        if self.status is SlotStatus.PUBLISHED:
            self.status = SlotStatus.FILLED

    def release(self) -> PackedWeights | None:
        """Empties the slot. Returns the adapter whose own memory the slot was, None where there is none."""
        self.require_unpublished()
        contents, self._contents, self.status = self._contents, None, SlotStatus.EMPTY
        return None if contents is None else contents.placement.weights

    def claim(self, salt: str) -> None:
        """Binds the published weights to `salt`, or checks that they are bound to it already.

        Raises WrongWeightsError where the slot is not published or its requests so far had another salt.
        """
        if self.status is not SlotStatus.PUBLISHED:
            raise WrongWeightsError(f"slot {self.number} holds no adapter")
        if self.salt is None:
            self.salt = salt
        if self.salt != salt:
            raise WrongWeightsError(f"slot {self.number} holds other weights")
