"""The registry of users: which row of the tables of a user model belongs to which name."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pjrlhf.errors import UserError
from pjrlhf.types import Array, Json, Tree


@dataclasses.dataclass(frozen=True)
class UserRegistry:
    """Names of the rows of user tables. Immutable: changes return a new registry and new tables.

    A table is any tree with leaves [U + 1, ...]: the table of a user model, its optimizer moments, or both. Row 0 is
    the generic user and has no name. A change to one user leaves the rows of all others bit-identical.

    Attributes:
      names: one per row; None for row 0 and for free rows.
    """

    names: tuple[str | None, ...]

    @classmethod
    def create(cls, users: Iterable[str], capacity: int = 0) -> "UserRegistry":
        """A registry with rows 1, 2, ... for `users` in order, and free rows up to `capacity` users in all."""
        users = tuple(users)
        registry = cls((None,) * (1 + max(len(users), capacity)))
        return dataclasses.replace(registry, names=registry._with(users))

    @classmethod
    def from_json(cls, value: Sequence[str | None]) -> "UserRegistry":
        return cls(tuple(value))

    def to_json(self) -> list[str | None]:
        return list(self.names)

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Name -> row."""
        return {name: i for i, name in enumerate(self.names) if name is not None}

    @property
    def capacity(self) -> int:
        """U, the number of rows for users, taken or free."""
        return len(self.names) - 1

    def indices(self, users: Iterable[str | None]) -> Int[np.ndarray, " B"]:
        """Rows of `users`; 0, the generic user, for None and unknown names."""
        return np.array([0 if user is None else self.rows.get(user, 0) for user in users], np.int32)

    def add_users(self, table: Tree, users: Sequence[str]) -> tuple["UserRegistry", Tree]:
        """Gives each new user a free row, initialised with the generic user's.

        Raises:
          UserError: a user exists already, or there are too few free rows (see `grow`).
        """
        new = UserRegistry(self._with(users))
        rows = new.indices(users)
        return new, self._map(lambda x: x.at[rows].set(x[0]), table)

    def remove_users(self, tree: Tree, users: Sequence[str]) -> tuple["UserRegistry", Tree]:
        """Removes users: zeroes their rows in every leaf of `tree` and frees them for others.

        To leave no trace, `tree` must hold the optimizer's moments (`state["rows"]` of `lazy_adam`) as well as the
        table.

        Raises:
          UserError: an unknown user.
        """
        rows = self._rows_of(users)
        removed = set(users)
        names = tuple(None if name in removed else name for name in self.names)
        return UserRegistry(names), self._map(lambda x: x.at[rows].set(0), tree)

    def grow(self, tree: Tree, count: int) -> tuple["UserRegistry", Tree]:
        """Appends `count` free rows, zero in every leaf."""
        grown = self._map(lambda x: jnp.concatenate([x, jnp.zeros((count, *x.shape[1:]), x.dtype)]), tree)
        return UserRegistry(self.names + (None,) * count), grown

    def export_users(self, table: Tree, users: Sequence[str]) -> dict[str, Json]:
        """Name -> all parameters of the user as JSON values, which `import_users` restores exactly.

        Raises:
          UserError: an unknown user.
        """
        found = zip(users, self._rows_of(users).tolist(), strict=True)
        return {user: self._map(lambda x, row=row: np.asarray(x[row]).tolist(), table) for user, row in found}

    def import_users(self, table: Tree, exported: Mapping[str, Json]) -> tuple["UserRegistry", Tree]:
        """Writes exported users to their rows, and new users to free rows.

        Raises:
          UserError: parameters of another kind or size of user model, or too few free rows (see `grow`).
        """
        new = UserRegistry(self._with([user for user in exported if user not in self.rows]))
        values = []
        for user, value in exported.items():
            try:
                values.append(self._map(lambda x, v: _shaped(v, x), table, value))
            except ValueError as error:
                raise UserError(
                    f"user {user!r}: does not fit the user table ({error}); import users of the same user model"
                ) from error
        rows = new.indices(exported)  # all at once: each change copies the table
        return new, self._map(lambda x, *v: x.at[rows].set(np.stack(v)) if v else x, table, *values)

    def _rows_of(self, users: Sequence[str]) -> Int[np.ndarray, " B"]:
        for user in users:
            if user not in self.rows:
                raise UserError(f"user {user!r}: unknown name; the table has {len(self.rows)} users")
        return self.indices(users)

    def _with(self, users: Sequence[str]) -> tuple[str | None, ...]:
        """`names` with `users` on the first free rows."""
        taken = set(self.rows)
        for user in users:
            if not isinstance(user, str) or not user:
                raise UserError(f"user {user!r}: a name is a string of at least one character; give another one")
            if user in taken:
                raise UserError(f"user {user!r}: the name is taken; give another one or remove that user first")
            taken.add(user)
        free = [i for i, name in enumerate(self.names) if i and name is None]
        if len(users) > len(free):
            raise UserError(
                f"user {users[len(free)]!r}: all {self.capacity} rows of the user table are taken; remove somebody or "
                "grow the table"
            )
        names = list(self.names)
        for row, user in zip(free, users, strict=False):  # may leave free rows
            names[row] = user
        return tuple(names)

    def _map(self, change: Callable[..., Array | Json], tree: Tree, *others: Tree) -> Tree:
        def checked(leaf, *values):
            if leaf.shape[0] != len(self.names):
                raise ValueError(f"a user table of {leaf.shape[0]} rows beside a registry of {len(self.names)}")
            return change(leaf, *values)

        return jax.tree.map(checked, tree, *others)


def _shaped(value: Json, leaf: Array) -> np.ndarray:
    row = np.asarray(value, leaf.dtype)
    if row.shape != leaf.shape[1:]:
        raise ValueError(f"shape {row.shape} instead of {leaf.shape[1:]}")
    return row
