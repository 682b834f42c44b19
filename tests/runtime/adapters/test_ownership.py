"""State has one owner: a module of the room changes the fields of its own objects only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorapool_runtime.adapters

ROOM = Path(lorapool_runtime.adapters.__file__).parent
MUTATORS = {"add", "append", "clear", "discard", "pop", "popitem", "remove", "setdefault", "update"}
RECORDS_ARE_PRIVATE = {"slot_table.py": "occupant", "host_cache.py": "kept"}


def foreign_changes(module: Path) -> list[str]:
    """Assignments to a field of another object, and mutating calls on a container that another object holds."""
    own = {"self", RECORDS_ARE_PRIVATE.get(module.name)}
    found = []
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Attribute(value=owner, ctx=ast.Store() | ast.Del()) if ast.unparse(owner) not in own:
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=owner) as container, attr=name)) if (
                name in MUTATORS and ast.unparse(owner) not in own
            ):
                found.append(ast.unparse(container))
    return found


@pytest.mark.parametrize("module", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_only_the_owner_of_a_field_changes_it(module: Path) -> None:
    assert foreign_changes(module) == []


def test_a_change_of_a_field_or_a_container_of_another_object_is_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("entry.slot = 1\nself._table.on_disk.add(2)\ntable.entry.waiting += 1\nself._a, entry.b = 1, 2\n")
    assert foreign_changes(bad) == ["entry.slot", "self._table.on_disk", "table.entry.waiting", "entry.b"]
