"""K policies by PPO, or a critic-free relative, against rewards of one or several objectives, in one program
(Personalized Soups, arXiv 2310.11564; checklist of Huang et al. 2023).

Soups, MORL, Prompted-MORL, MOC and CLP are settings of it: what the policies are trained for (see `targets`), how their
objectives become one advantage (see `objectives.scalarization`), and what estimates it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pjrlhf.algorithms import answering, banks, reward
from pjrlhf.algorithms.policy_host import ask, sampled_and_asked
from pjrlhf.algorithms.policy_settings import PolicySettings, check, settings_of
from pjrlhf.algorithms.policy_step import Judged, PolicyStep
from pjrlhf.algorithms.policy_table import answer_rows
from pjrlhf.algorithms.targets import PromptRows, targets_of
from pjrlhf.data.batching import batches
from pjrlhf.models.adapters import Backbone, init_bank
from pjrlhf.parallel.processes import to_host
from pjrlhf.rollout.batches import PromptBatch, Rollout, join_rows, split_rows
from pjrlhf.rollout.experience import init_value_heads
from pjrlhf.runtime.devices import Devices
from pjrlhf.runtime.run import Run, Stage, Trainer
from pjrlhf.runtime.streams import Streams
from pjrlhf.training.completions import Row
from pjrlhf.training.loop import Method
from pjrlhf.training.metrics import Metrics
from pjrlhf.training.progress import progress
from pjrlhf.training.state import State
from pjrlhf.types import Params

KL_STEPS = 10  # the last steps, over whose mean the KL of a policy is reported


class Policy(PolicyStep, Method):
    """The method for `training.loop.run`: rollouts, scores and PPO updates of all K policies in one program.

    Args:
      data: the prompts to train on.
      rewarder: reward models as `reward.load` gives them.
      heldout: the prompts to evaluate on.
    """

    show = ("objective/scores", "objective/kl")
    watch = ("loss/policy_avg", "loss/value_avg", "objective/kl")

    def __init__(
        self,
        settings: PolicySettings,
        data: PromptRows,
        rewarder: Params,
        devices: Devices,
        backbone: Backbone,
        streams: Streams,
        heldout: PromptRows | None = None,
    ):
        super().__init__(settings, data.targets, data.text.sampling())
        self.data, self.rewarder, self.heldout = data, rewarder, heldout
        self.devices, self.backbone, self.streams = devices, backbone, streams
        self.rates = settings.optimizer.rates()
        samples = settings.experience.samples_per_prompt
        collate = functools.partial(data.collate, samples=samples)
        size = settings.rollouts // samples
        self.batches = batches(data, size, seed=streams.seed, collate=collate, key="policy.rollouts", rows="prompts")
        if self.targets.audience.sources:
            # The sources read text on the host, between sampling and the update.
            self._draw, self._update = devices.program(self.sample), devices.training_step(self.learn)
            self._join = devices.program(self.joined)
            self.programs = (self._draw, self._update, self._join)
        else:
            self._update = devices.training_step(self.whole)
            self.programs = (self._update,)
        # Apart from the programs of a step, whose compilations are counted.
        self._draw_with, self._judge = devices.program(self.sample_with), devices.program(self.judge)
        # A policy alone needs no name.
        self.ingredients = () if self.targets.sampled else self.targets.policies

    def init(self) -> State:
        return self.devices.create(self._initial, self.backbone)

    def _initial(self, backbone: Backbone) -> State:
        K, width = self.K, backbone.model.config.hidden_size
        names, adapters = self.recipe.rule.names(self.targets.scored), len(self.targets.adapters)
        trainable = {
            "bank": init_bank(backbone.base, backbone.adapter, adapters, self.streams.key("policy/adapter")),
            "value_heads": init_value_heads(K, len(names), width),
        }
        beta = jnp.full((K,), self.settings.kl.coefficient, jnp.float32)  # the type that an adapted one has
        kl = jnp.zeros((min(KL_STEPS, self.settings.steps), K))
        return State.create(self.streams.key("policy/state"), trainable, self.optimizer, beta=beta, kl=kl)

    def place(self, batch: PromptBatch) -> PromptBatch:
        """A batch [K, n, ...] on the devices, which share the rows of all policies: [K n, ...]."""
        return self.devices.place(join_rows(batch))

    def step(self, state: State, batch: PromptBatch) -> tuple[State, Metrics]:
        return self._advance(state, batch)[:2]

    def step_with_rows(self, state: State, batch: PromptBatch) -> tuple[State, Metrics, Callable[[], Sequence[Row]]]:
        """The same update, and a table of what it was made on."""
        state, metrics, judged = self._advance(state, batch)
        return state, metrics, lambda: list(answer_rows(self.data, join_rows(batch), judged))

    def _advance(self, state: State, batch: PromptBatch) -> tuple[State, Metrics, Judged]:
        placed = self.place(batch)
        if not self.targets.audience.sources:
            state, (metrics, judged) = self._update(state, self.backbone, self.rewarder, placed)
            return state, metrics, judged

        def draw(batch: PromptBatch, *part: np.int32) -> Rollout:
            return self._draw(state, self.backbone, self.place(batch) if part else placed, *part)

        parts = self.settings.reward_parts
        rollout, rewards, seconds = sampled_and_asked(self.data, batch, parts, draw, self._join)
        state, metrics, judged = self.finish(state, placed, rollout, rewards)
        timed: dict[str, Any] = {name: (np.float32(x), np.float32(1)) for name, x in seconds.items()}
        return state, {**metrics, **timed}, judged

    def finish(
        self, state: State, placed: PromptBatch, rollout: Rollout, host: Float[np.ndarray, "B S"]
    ) -> tuple[State, Metrics, Judged]:
        """The rest of a step with reward sources, on responses [K n, N]."""
        host = self.devices.place(host)
        state, (metrics, judged) = self._update(state, self.backbone, self.rewarder, placed, rollout, host)
        return state, metrics, judged

    def evaluate(self, state: State) -> dict[str, float]:
        """Mean rewards of answers to held-out prompts by the current policies, over all and of each, and their length.

        Every evaluation draws with the same keys.
        """
        if not self.heldout:
            return {}
        # A request has a row for each way to ask it, with and without its preferences stated.
        wanted = self.settings.eval_prompts * len(self.targets.stated)
        rows = [self.heldout[i] for i in range(min(wanted, len(self.heldout)))]
        samples = self.settings.experience.samples_per_prompt
        size = self.settings.rollouts // samples
        found, key = [], self.streams.key("policy/eval")
        with progress("policy: held-out prompts", -(-len(rows) // size)) as bar:
            for number, start in enumerate(range(0, len(rows), size)):
                part = rows[start : start + size]
                # Full batches, as in training; what fills the last one does not count.
                batch = self.heldout.collate((part * size)[:size], samples)
                placed = self.place(batch)
                bank, draw = state.trainable["bank"], jax.random.fold_in(key, number)
                rollout = self._draw_with(bank, self.backbone, placed, draw)
                host = None
                if self.targets.audience.sources:
                    host = self.devices.place(ask(self.heldout, batch, rollout)().rewards)
                scores = self._judge(self.backbone, self.rewarder, placed, rollout, host)
                kept = len(part) * samples
                scores, lengths = split_rows(to_host((scores, rollout.valid.sum(1))), self.K)
                found.append((scores[:, :kept], np.asarray(batch.targets.objectives)[:, :kept], lengths[:, :kept]))
                bar.update(number + 1, {})
        scores, objectives, lengths = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        values = {"length": float(lengths.mean())}
        for i, name in enumerate(self.targets.audience.rewards):
            own = np.where(objectives == i, scores, np.nan)
            known = {policy: x[~np.isnan(x)] for policy, x in zip(self.targets.policies, own, strict=True)}
            known = {policy: x for policy, x in known.items() if len(x)}
            if known:
                values[f"rewards/{name}"] = float(np.concatenate(list(known.values())).mean())
            if len(known) > 1 and self.ingredients:
                values |= {f"rewards/{name}/{policy}": float(x.mean()) for policy, x in known.items()}
        return values

    def asked(self, eval_every: int) -> dict[str, int]:
        """Criterion -> the answers, at most, that its reward source is asked about, those of evaluations included."""
        s, size = self.settings, self.settings.rollouts // self.settings.experience.samples_per_prompt
        rows = min(s.eval_prompts * len(self.targets.stated), len(self.heldout)) if self.heldout else 0
        answers = s.rollouts * (s.steps + (s.steps // eval_every if eval_every else 0) * -(-rows // size))
        # A policy of its own asks about its criterion alone.
        policies = dict.fromkeys(self.targets.policies, 1) if self.targets.kind == "own" else {}
        each = self.K if self.targets.kind != "own" else 0
        return {name: answers * policies.get(name, each) for name in self.targets.audience.rewards}

    def last_kl(self, state: State) -> dict[str, float]:
        """Policy -> mean KL to the base over its last `KL_STEPS` steps, in nats per answer."""
        means = to_host(state.extra["kl"]).mean(0)
        return dict(zip(self.targets.policies, means.tolist(), strict=True))


# ---- the stage


def method_of(run: Run, settings: PolicySettings | None = None, rewarder: Params | None = None) -> Policy:
    """The method for policies of a run, by default those of its stage, trained on its reward models."""
    settings = settings or settings_of(run)
    targets = targets_of(run, settings)
    prompts = settings.steps * settings.rollouts // settings.experience.samples_per_prompt
    data = PromptRows(targets, run.records, run.text, prompts)
    heldout = PromptRows(targets, run.records, run.text, part=1) if run.settings.eval_every else None
    rewarder = rewarder or reward.load(run)
    return Policy(settings, data, rewarder, run.devices, run.workspace.backbone, run.streams, heldout)


def run(run: Run) -> dict[str, Any]:
    """Trains the policies; writes <workdir>/policy/bank.safetensors and one folder per adapter (PEFT, or a full
    model).
    """
    return train(run, settings_of(run), "policy")


def train(run: Run, settings: PolicySettings, stage: str) -> dict[str, Any]:
    """The same by the section `settings`, into <workdir>/<stage>."""
    method = method_of(run, settings)
    run.audience.announce(stage, method.asked(run.settings.eval_every))
    state, names = run.train(method, stage, settings.steps), list(method.targets.adapters)
    base_hash = banks.save(run, stage, names, state.trainable["bank"])
    return {
        "ingredients": names,
        "rollouts_per_policy": settings.steps * settings.rollouts,
        "samples": settings.steps * settings.rollouts * method.K,
        "base": base_hash,
        "kl": method.last_kl(state),
    }


TRAINER = Trainer(settings_of, train, answering.by_targets, check)
STAGE = Stage("policy", run, PolicySettings)
