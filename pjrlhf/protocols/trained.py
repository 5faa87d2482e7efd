"""A trained entry of `preference.models`, ready to be asked."""

import copy
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pjrlhf.algorithms import pdpo_entries
from pjrlhf.algorithms.pdpo_objective import PairMargins
from pjrlhf.algorithms.pdpo_settings import Entry, PreferenceSettings
from pjrlhf.data.messages import Prompt, with_text
from pjrlhf.data.schema import Example
from pjrlhf.feedback.history import with_history
from pjrlhf.feedback.pairs import Pairs, given_parts
from pjrlhf.models.adapters import Backbone, Policies
from pjrlhf.parallel.processes import to_host
from pjrlhf.runtime.run import Run
from pjrlhf.types import Array, Params, PRNGKey


class Trained:
    """One entry of `preference.models` after training.

    People keep the rows they were trained in, whatever the order or number of people in `pairs`; those who were not
    trained on are the generic user.

    Attributes:
      pairs: with the people of the trained user table.
      trainable: {"bank", "users"}, and "heads" of a reward model.
      users: its user model.
    """

    def __init__(self, run: Run, entry: Entry, pairs: Pairs, max_new_tokens: int = 0):
        self.run, self.entry, self.max_new_tokens = run, entry, max_new_tokens
        self.backbone = run.workspace.backbone
        self.trainable, registry = pdpo_entries.load(run, entry)
        self.pairs = pairs = pairs.for_head(entry.objective.head).seen_by(registry)
        width = self.backbone.model.config.hidden_size
        self.users = pdpo_entries.user_model(entry, registry.capacity, width, self.trainable["bank"])
        scorer = run.scorer(entry.batch_size)
        self._margins = PairMargins(entry, self.users, pairs, self.backbone, scorer)
        self._known: dict[tuple[str, int, int], float] = {}

    def reading(self, pairs: Pairs) -> "Trained":
        """The same parameters for other prompts."""
        other = copy.copy(self)
        other.pairs, other._known = pairs.for_head(self.entry.objective.head).seen_by(self.pairs.registry), {}
        scorer = self.run.scorer(self.entry.batch_size)
        other._margins = PairMargins(self.entry, self.users, other.pairs, self.backbone, scorer)
        return other

    def margins(
        self, part: str, users: np.ndarray, rows: Sequence[int] | None = None, trainable: Params | None = None
    ) -> np.ndarray:
        """Margins of `rows` of a part as seen by `users`, see `algorithms.pdpo_objective.PairMargins`. Those of the
        trained parameters are computed once.
        """
        if trainable is not None:
            return self._margins(trainable, part, users, rows)
        rows = range(len(self.pairs.tables[part])) if rows is None else rows
        if not (self.users.num_tokens or self.users.mixes or self.users.personal):
            users = np.zeros_like(users)  # everybody sees the same
        keys = {row: (part, row, int(users[row])) for row in rows}
        if new := [row for row, key in keys.items() if key not in self._known]:
            found = self._margins(self.trainable, part, users, new)
            self._known |= {keys[row]: float(margin) for row, margin in zip(new, found, strict=True)}
        return np.array([self._known[keys[row]] for row in rows], np.float32)

    def policies(self, backbone: Backbone, trainable: Params, users: Int[Array, " B"]) -> Policies:
        """The policies of `users`, one per row."""
        return pdpo_entries.policies_of(self.users, backbone, trainable, users)

    def answers(self, prompts: Sequence[Prompt], users: Sequence[str]) -> list[list[str]]:
        """For each user, an answer to each prompt, none of which anybody was trained on. What stands before prompts of
        the user in evaluation, what they say about themselves or what is written of their comparisons, stands there.
        """
        pairs, told = self.pairs, {}
        if self.entry.users.user_text:
            told = {e.user_id: str(e.user_text) for part in ("heldout", "train") for e in pairs.tables[part].examples}
        asked = [Example(prompt=prompt, user_id=user) for user in users for prompt in prompts]
        if self.entry.users.read:
            past = given_parts(self.run, self.run.section(PreferenceSettings)) if pairs.parts is None else pairs.parts
            parts = {"train": past["train"][0], "heldout": asked}
            asked = with_history(parts, self.entry.users.read, self.run, only=("heldout",))["heldout"]
        texts = [with_text(one.prompt, told[one.user_id]) if told else one.prompt for one in asked]
        who = np.repeat(pairs.registry.indices(users), len(prompts))
        longest = self.max_new_tokens or self.run.settings.data.max_completion
        sampler = self.run.sampler(self.policies, self.run.text.sampling(max_new_tokens=longest))
        found = sampler(f"evaluate_users: answers of {self.entry.name}", texts, self._keys, self.trainable, who)
        return [found[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(users))]

    def _keys(self, chunk: int) -> PRNGKey:
        # The first chunk has the key of the stream itself.
        return self.run.streams.key("evaluate_users/answers", *(chunk,)[:chunk])

    def vectors(self) -> np.ndarray | None:
        """What the user model knows about each user, in the order of their rows, [U, D'], or None."""
        if not self.users.personal:
            return None
        rows = list(self.pairs.registry.rows.values())
        tokens, mix = self.users.apply(self.trainable["users"], jnp.array(rows, jnp.int32))
        return to_host(tokens if tokens is not None else mix).reshape(len(rows), -1)
