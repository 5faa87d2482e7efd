"""The settings of user models: the entries and the section `preference`.

Each entry of `preference.models` is one run of the same training on the same pairs with the same budget; the
controls, pooled DPO and permuted user ids, are two more entries. An entry has the settings of its user model
(`EntrySettings`), and may have those of `PreferenceConfig` where they differ from the section's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pjrlhf.errors import UserError
from pjrlhf.feedback.history import History
from pjrlhf.feedback.pairs import PairSettings
from pjrlhf.feedback.writers.kinds import writer
from pjrlhf.models.users import KINDS, STARTS
from pjrlhf.rollout.preference import PreferenceConfig
from pjrlhf.settings import Settings, check_names, parse, setting
from pjrlhf.training.accumulation import check_accumulation
from pjrlhf.training.optimizer import OptimizerSettings, check_warmup


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntrySettings(Settings):
    """An entry of `preference.models`: a user model, and what differs from the section where it differs."""

    kind: str = setting("individualized", "the user model", choices=lambda: tuple(KINDS), extensible=True)
    tokens: int = setting(10, "user tokens, of the kinds that have them", low=1, high=4096)
    clusters: int = setting(5, "of kind cluster", low=1, high=10**6)
    start: str = setting("vocabulary", "what user tokens start from", choices=STARTS)
    std: float = setting(0.02, "of user tokens that start normal", low=0.0, high=1e3)
    zero_offset: bool = setting(True, "every user starts equal to the generic one")
    permuted: bool = setting(False, "train on the same pairs under wrong names (or texts): the control")
    warm_start: float = setting(
        0.0,
        "of kind cluster: fraction of the steps that train vectors of everybody's own, then clustered",
        low=0.0,
        below=1.0,
    )
    user_text: bool = setting(False, "what people say about themselves stands before the prompt")
    history: int = setting(0, "comparisons of the person that the writer reads", low=0, high=10**4)
    writer: str | Mapping[str, Any] = setting(
        "",
        'what of a person\'s comparisons stands before the prompt: a kind, or {"kind": ..., setting: value}, see '
        "feedback/writers; fewshot where empty, the comparisons themselves",
    )
    varied: bool = setting(False, "a training prompt is after 0 to `history` comparisons, drawn evenly")
    similar: bool = setting(False, "the writer reads the comparisons on the prompts most like the one that is asked")

    @property
    def added(self) -> int:
        """Number of user tokens that stand before a prompt."""
        return self.tokens if "tokens" in KINDS.get(self.kind).sizes else 0

    @property
    def read(self) -> History | None:
        """What is read of a person's comparisons outside training, and who writes it down; None for nothing."""
        if not (self.history or self.writer):
            return None
        return History(
            count=self.history, writer=writer(self.writer or "fewshot"), varied=self.varied, similar=self.similar
        )

    @property
    def texts(self) -> dict[str, Any]:
        """What of people stands before prompts outside training; see `feedback.pairs.tables_of`."""
        return {"user_text": self.user_text, "others_text": False, "history": self.read}

    @property
    def trained_texts(self) -> dict[str, Any]:
        """The same in training, where it is permuted in the control."""
        history = self.read
        history = history and dataclasses.replace(history, permuted=self.permuted)
        return {"user_text": self.user_text, "permuted_text": self.user_text and self.permuted, "history": history}

    def check(self) -> None:
        history = self.read
        if history and history.writer.reads and not history.count:
            raise UserError(f"history: writer {self.writer!r} has nothing to read; set it to 1 or more")
        if self.similar and not (history and history.writer.reads):
            raise UserError("similar: there is nothing to choose from; set history and a writer that reads comparisons")
        try:
            KINDS.get(self.kind)
        except UserError as error:
            raise UserError(f"kind: {error}") from error
        if self.warm_start and self.kind != "cluster":
            raise UserError(f"warm_start: kind {self.kind!r} has no clusters to start; set it to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One training: a user model, its objective and its budget.

    Attributes:
      name: in `preference.models`.
      steps, batch_size: updates, and pairs of each.
      accumulation_steps: parts of a batch.
      optimizer, user_optimizer: of the policy or reward model, and of the user model.
    """

    name: str
    users: EntrySettings
    objective: PreferenceConfig
    steps: int
    batch_size: int
    accumulation_steps: int
    optimizer: OptimizerSettings
    user_optimizer: OptimizerSettings

    def part(self, steps: int, kind: str) -> "Entry":
        """A part of the training, with another kind of user model."""
        return dataclasses.replace(self, steps=steps, users=self.users.replace(kind=kind, warm_start=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PairSettings, PreferenceConfig):
    """Entries of user models, trained on the same pairs with the same budget."""

    models: Mapping[str, Any] = setting(
        {
            "pooled": {"kind": "uniform"},
            "individualized": {"kind": "individualized", "tokens": 4},
            "cluster": {"kind": "cluster", "tokens": 4, "clusters": 2, "warm_start": 0.5},
            "permuted": {"kind": "individualized", "tokens": 4, "permuted": True},
        },
        "name -> entry; an entry may differ from the section in everything from head to sft_weight",
    )
    bank: str = setting(
        "",
        "for entries of kind soup: policy, or bank.safetensors of a stage policy on the same base, its folder, or its "
        "name on the hub",
        path=True,
    )
    steps: int = setting(160, "updates of each entry", low=1, high=10**9)
    epochs: float = setting(0.0, "passes over the pairs instead of steps; 0 is steps", low=0.0, high=1e6)
    accumulation_steps: int = setting(1, "parts of a batch that are computed one after the other", low=1, high=2**20)
    optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-3, schedule="cosine", warmup_steps=5), "of the policy or reward model"
    )
    user_optimizer: OptimizerSettings = setting(
        OptimizerSettings(learning_rate=3e-2, schedule="cosine"), "of the user model"
    )

    def check(self) -> None:
        super().check()
        check_accumulation(self.accumulation_steps, self.batch_size)
        if not self.models:
            raise UserError("models: there is none; add an entry such as {'pooled': {'kind': 'uniform'}}")
        check_names("models", self.models)
        for name in self.models if not self.bank else ():
            if KINDS.get(self.entry(name).users.kind).mixes:
                raise UserError(
                    f"bank: entry {name!r} mixes policies; name the bank.safetensors of a stage policy with "
                    "--config.preference.bank, or policy for that of this run"
                )
        if not self.epochs:
            self.check_steps(self.steps)

    def check_steps(self, steps: int, section: str = "", source: str = "") -> None:
        """Raises UserError for a warm-up that leaves none of so many updates.

        Args:
          section: prefix of keys in messages.
          source: where the number of updates comes from.
        """
        for name in self.models:
            share = self.entry(name).users.warm_start
            # Two parts where the first trains vectors for the clusters.
            first = round(share * steps)
            for order, part in (("before", first), ("after", steps - first)):
                told = f" {order} models.{name}.warm_start={share:g} of {steps} steps" if first else ""
                for key in ("optimizer", "user_optimizer") if part else ():
                    check_warmup(getattr(self, key), part, f"{section}{key}", f"{told}{source}")

    def entry(self, name: str) -> Entry:
        """An entry of `models`.

        Raises:
          UserError: a setting of the entry that is not known or does not fit.
        """
        values = self.models[name]
        if not isinstance(values, Mapping):
            raise UserError(f"models.{name}: {values!r} is not an entry; give it a kind")
        objective = {field.name: getattr(self, field.name) for field in dataclasses.fields(PreferenceConfig)}
        objective |= {key: value for key, value in values.items() if key in objective}
        own = {key: value for key, value in values.items() if key not in objective}
        if "kind" not in own:
            raise UserError(f"models.{name}: has no kind; choose one of {', '.join(KINDS)}")
        return Entry(
            name=name,
            users=parse(EntrySettings, own, f"models.{name}"),
            objective=parse(PreferenceConfig, objective, f"models.{name}"),
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            optimizer=self.optimizer,
            user_optimizer=self.user_optimizer,
        )
