"""A trained entry of `preference.models`, ready to be asked."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjrlhf.algorithms import pdpo as preference
from pjrlhf.algorithms.pdpo import Preference, answer_scores, pair_rewards
from pjrlhf.feedback.pairs import Pairs, with_text
from pjrlhf.models.adapters import Policies
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout.sampler import generate
from pjrlhf.runtime.run import Run


class Trained:
    """One entry of `preference.models` after training."""

    def __init__(self, run: Run, name: str, pairs: Pairs, max_new_tokens: int = 0):
        self.run, self.pairs, self.max_new_tokens = run, pairs, max_new_tokens
        self.method = Preference(run, name, pairs)
        self.trainable = preference.load(run, name)
        self._margins = jax.jit(self._batch_margins)
        self._answers = jax.jit(self._sample)

    def _batch_margins(self, trainable: Any, base: Any, batch: Any) -> jax.Array:
        run, objective = self.run, self.method.objective
        scores = answer_scores(run.workspace.model, run.workspace.adapter, self.method.users, trainable, base, batch)
        chosen, rejected = pair_rewards(objective, scores, batch)
        return chosen - rejected

    def margins(
        self, part: str, users: np.ndarray, rows: Sequence[int] | None = None, trainable: Any = None
    ) -> np.ndarray:
        """Reward margins (of a policy the implicit ones, beta Delta), float32, of `rows` of `part`, as seen by `users`
        [N of the part].
        """
        table = self.pairs.tables[part]
        rows = range(len(table)) if rows is None else rows
        size, found = self.pairs.settings.batch_size, []
        for start in range(0, len(rows), size):
            index = [rows[i] for i in range(start, min(start + size, len(rows)))]
            padded = [table[i] for i in index + [index[0]] * (size - len(index))]
            batch = self.run.devices.place(self.method.collate(part, users, padded))
            margins = self._margins(trainable or self.trainable, self.run.workspace.base, batch)
            found.append(to_host(margins)[: len(index)])
        return np.concatenate(found)

    def _sample(self, trainable: Any, base: Any, prompt: Any, users: jax.Array, key: jax.Array) -> Any:
        tokens, mix = self.method.users.apply(trainable["users"], users)
        mix = jnp.ones((1, 1)) if mix is None else mix
        policies = Policies(self.run.workspace.model, self.run.workspace.adapter, base, trainable["bank"], mix, tokens)
        longest = self.max_new_tokens or self.run.settings.data.max_completion
        sampling = self.run.text.sampling(max_new_tokens=longest)
        return generate(policies, sampling, prompt["prompt"], prompt["valid"], key)

    def answers(self, prompts: Sequence[Any], users: Sequence[str]) -> list[list[str]]:
        """For each user, an answer to each prompt; what users say about themselves is put before it where the entry's
        user model reads that.
        """
        pairs, told = self.pairs, {}
        if self.method.settings.user_text:
            told = {e.user_id: e.user_text for e in pairs.tables["train"].examples}
        asked = [with_text(prompt, told[user]) if told else prompt for user in users for prompt in prompts]
        who = np.repeat(pairs.registry.indices(users), len(prompts))
        arrays = self.run.text.encode(asked)
        out = self._answers(
            self.trainable, self.run.workspace.base, arrays, who, self.run.streams.key("evaluate_users/answers")
        )
        texts = self.run.text.decode(arrays, out)
        return [texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(users))]

    def vectors(self) -> np.ndarray | None:
        """What the user model knows about each user, in the order of their rows, [U, D'], or None."""
        if not self.method.personal:
            return None
        rows = np.array(list(self.pairs.registry.rows.values()), np.int32)
        tokens, mix = self.method.users.apply(self.trainable["users"], rows)
        return to_host(tokens if tokens is not None else mix).reshape(len(rows), -1)
