"""What a caller may see of the usage. Pure.

    admin key, namespaces "*"     everything, and as the only one costs of pods, idle time and findings
    admin key, listed namespaces  everything of these projects
    other key, listed namespaces  these projects; of them only its `models`, where its Secret lists some
    other key, namespaces "*"     the usage of this very key: it has no project of its own

A project that the caller may not see is filtered out like one that does not exist, so that the two look the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, true
from sqlalchemy.sql.selectable import FromClause

from lorapool_gateway.routing.auth import ApiKey

Names = frozenset[str] | None
"""The only values that count; None: all."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows of usage a caller sees, or has asked for."""

    projects: Names = None
    keys: Names = None
    """By the uids of their Secrets."""
    models: Names = None
    owner: bool = False
    """Whether the caller runs the release: it sees pods, idle time, costs and findings."""

    def narrowed(
        self,
        *,
        projects: Collection[str] | None = None,
        keys: Collection[str] | None = None,
        models: Collection[str] | None = None,
    ) -> Scope:
        """The part of this scope that has these values; None leaves a dimension as it is."""
        return replace(
            self,
            projects=_both(self.projects, projects),
            keys=_both(self.keys, keys),
            models=_both(self.models, models),
        )

    @property
    def all_keys(self) -> bool:
        """Whether keys make no difference, so that sums without keys can be read."""
        return self.keys is None

    def permits_project(self, project: str) -> bool:
        return self.projects is None or project in self.projects

    def where(self, table: FromClause) -> ColumnElement[bool]:
        """The condition on a table with the columns `project`, `model` and, where keys count, `key_uid`."""
        condition: ColumnElement[bool] = true()
        for column, values in (("project", self.projects), ("key_uid", self.keys), ("model", self.models)):
            if values is not None:
                condition &= table.c[column].in_(sorted(values))
        return condition


def scope_of(key: ApiKey) -> Scope:
    """What a key may see."""
    if key.admin:
        return Scope(projects=key.namespaces, owner=key.namespaces is None)
    if key.namespaces is None:
        return Scope(keys=frozenset({key.uid}), models=key.models)
    return Scope(projects=key.namespaces, models=key.models)


def _both(mine: Names, asked: Collection[str] | None) -> Names:
    if asked is None:
        return mine
    return frozenset(asked) if mine is None else mine & frozenset(asked)
