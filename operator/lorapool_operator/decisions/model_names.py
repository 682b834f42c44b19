"""Whether an object has the additional model name that its spec claims."""

from __future__ import annotations

from lorapool_api.common import Reason
from lorapool_operator.decisions.plan import ConditionValue
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, Key


def granted_name(item: BaseObject | AdapterObject, holder: Key | None) -> str | None:
    """Returns the claimed name unless it is reserved or `holder`, another object, has it."""
    return item.extra_name if name_conflict(item, holder) is None else None


def name_conflict(item: BaseObject | AdapterObject, holder: Key | None) -> ConditionValue | None:
    """Returns the condition of an object that does not have the name that it claims; None for any other object.

    The message names no object of another namespace.
    """
    name = item.extra_name
    if not name:
        return None
    field = "spec.alias" if isinstance(item, AdapterObject) else "spec.servedName"
    if "/" in name:
        return ("True", Reason.NAME_RESERVED.value, f"{field} {name} has the form of a full name; remove the slash.")
    if holder is None:
        return None
    owner = f"{holder.kind.value} {holder}" if holder.namespace == item.meta.namespace else "another model"
    message = f"{field} {name} belongs to {owner} among the models of namespace {item.names_in}; choose another name."
    return ("True", Reason.ALIAS_TAKEN.value, message)
