"""How well each person is served: accuracy per user on held-out prompts, the generic user, new people, and answers.

The controls stand beside every personalized figure: pooled DPO on the same data and budget, and permuted user ids.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pjrlhf.algorithms.pdpo_settings import EntrySettings, PreferenceSettings
from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import as_request, columns_of, request_of, text_of
from pjrlhf.data.schema import Example, is_tie
from pjrlhf.errors import UserError
from pjrlhf.evaluation import surface
from pjrlhf.evaluation.users import (
    accuracy_by,
    by_powers_of_two,
    choice_accuracy,
    cold_start_curve,
    length_matched,
    paired_gain,
    principal_axes,
    rate_of_people,
    user_accuracy,
)
from pjrlhf.feedback.pairs import Pairs, given_parts, read_pairs
from pjrlhf.feedback.population import Labels, PopulationSettings, Triple
from pjrlhf.protocols import in_context
from pjrlhf.protocols.cold_start import fit_changed_minds, fit_new_users
from pjrlhf.protocols.reporting import finish
from pjrlhf.protocols.role_play import PersonColumns, RolePlay, check_role_play, descriptions
from pjrlhf.protocols.trained import Trained
from pjrlhf.runtime.run import TIE, Run, Stage
from pjrlhf.settings import Settings, setting
from pjrlhf.training.progress import progress

# Models that every report has, or may have, beside the entries of `preference.models`.
OWN = {
    "base": "the base itself",
    "base_told": "the base that is told what people say about themselves",
    "base_told_others": "the base that is told what somebody else says",
    "surface": "the regression on surface features",
    "surface_personal": "the regression on surface features per person",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsersSettings(Settings):
    """How well each person is served."""

    resamples: int = setting(2000, "of the bootstrap", low=2, high=10**6)
    grid_pairs: int = setting(
        400,
        "at most, per cell of known and new people and prompts: enough to tell a fraction within 5 %",
        low=1,
        high=10**8,
    )
    surface: bool = setting(False, "compare with logistic regressions on surface features of the answers")
    generate_for: int = setting(4, "held-out prompts answered as every user; 0 skips generation", low=0, high=10**6)
    max_new_tokens: int = setting(0, "of these answers; 0 is data.max_completion", low=0, high=2**20)
    judge: str | Mapping[str, Any] = setting(
        "",
        'who compares these answers with those of the base in the place of each person: {"kind": "chat"} or {"kind": '
        '"model"} with settings, see protocols/role_play.py; nobody where empty',
    )
    person_columns: PersonColumns = setting(PersonColumns())
    cold_start: tuple[int, ...] = setting(
        (0, 1, 2, 4, 8, 16), "comparisons a new person gives; () skips it", low=0, high=10**6
    )
    cold_start_models: tuple[str, ...] = setting(
        ("individualized", "cluster"),
        "entries that meet new people: their row is fitted, or, without rows, a writer reads their comparisons",
    )
    cold_start_steps: int = setting(20, "updates of a new person's row", low=1, high=10**6)
    cold_start_learning_rate: float = setting(0.1, "of these updates", above=0.0, high=1e6)
    changed_after: int = setting(
        0,
        "comparisons after which the people of cold_start change their mind: they prefer what they disliked, and give "
        "as many comparisons as cold_start says; 0 skips it",
        low=0,
        high=10**6,
    )

    def check(self) -> None:
        super().check()
        if self.judge:
            check_role_play(self.judge)
            if not self.generate_for:
                raise UserError("generate_for: is 0, and the judge compares these answers; set it to 1 or more")


def run(run: Run) -> dict[str, Any]:
    """Evaluates every trained entry; writes <workdir>/report."""
    started = time.perf_counter()
    config, preference = run.section(UsersSettings), run.section(PreferenceSettings)
    models = preference.models
    parts = given_parts(run, preference)
    made = functools.cache(functools.partial(read_pairs, run, preference, parts))
    pairs = made(**EntrySettings().texts)
    held = pairs.tables["heldout"].examples
    # Columns of your own data may have the same names and mean other things.
    simulated = isinstance(preference.data, str)
    questions = not isinstance(preference.data, str) and preference.data.get("kind") == "choices"
    groups = {str(e.user_id): e.extra["persona"] for e in held} if simulated else None
    settings = {"groups": groups, "resamples": config.resamples, "seed": run.streams.seed}
    summary: dict[str, Any] = {"controls": [name for name in models if preference.entry(name).users.permuted]}
    sections = ("accuracy", "gain", "choices", "length_matched", "grid", "embedding", "cold_start", "generation")
    sections += ("by_people", "changed_minds", "context", "size", "people_win_rate")
    sections += ("role_play",) if config.judge else ()
    summary |= {section: {} for section in sections}
    samples: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    by_model: dict[str, dict[str, list[str]]] = {}  # model -> person -> answers to `prompts`
    prompts = list({as_request(example.prompt): example for example in held}.values())[: config.generate_for]
    role = _role(run, pairs, groups or {}) if config.judge else None
    if role:
        answering = sum(preference.entry(name).objective.head == "policy" for name in models)
        people = sum(user in role.people for user in pairs.registry.rows)
        role.announce("evaluate_users", answering * people * len(prompts))
    base = _base_answers(run, prompts) if role else []
    # The base itself, by its own log-probs, and what surface features alone can tell.
    score = functools.partial(_score, summary, questions=questions, settings=settings)
    score("base", np.subtract(*pairs.reference["heldout"].T), None, held)
    if any(preference.entry(name).users.user_text for name in models):
        for name, others in (("base_told", False), ("base_told_others", True)):
            told = made(**EntrySettings(user_text=True).texts | {"others_text": others})
            score(name, np.subtract(*told.reference["heldout"].T), None, told.tables["heldout"].examples)
    for name, (own, generic) in _surface(pairs).items() if config.surface else ():
        score(name, own, generic, held)
    for name in models:
        entry = preference.entry(name)
        trained = Trained(run, entry, made(**entry.users.texts), config.max_new_tokens)
        held = trained.pairs.tables["heldout"].examples
        own, nobody = trained.pairs.users("heldout"), np.zeros(len(held), np.int32)
        score(name, trained.margins("heldout", own), trained.margins("heldout", nobody), held)
        summary["by_people"][name] = _by_people(trained, settings)
        summary["size"][name] = _size(trained)
        summary["grid"][name] = _grid(trained)
        vectors = trained.vectors()
        if vectors is not None:
            axes = principal_axes(vectors)
            users = list(trained.pairs.registry.rows)
            who = [(groups or {}).get(user) for user in users]
            summary["embedding"][name] = {"users": users, "groups": who, "x": axes[:, 0], "y": axes[:, 1]}
        if entry.users.read:
            options = {key: settings[key] for key in ("resamples", "seed")}
            summary["context"][name] = in_context.controls(trained, "heldout", **options)
        if name in config.cold_start_models and config.cold_start and not trained.users.personal:
            summary["cold_start"][name] = cold_start_curve(in_context.new_people(trained, config.cold_start))
        elif name in config.cold_start_models and config.cold_start:
            fit = config.cold_start, config.cold_start_steps, config.cold_start_learning_rate
            summary["cold_start"][name] = cold_start_curve(fit_new_users(trained, *fit))
            if config.changed_after:
                changed = fit_changed_minds(trained, config.changed_after, *fit)
                summary["changed_minds"][name] = {way: cold_start_curve(found) for way, found in changed.items()}
        if config.generate_for and entry.objective.head == "policy":
            section, sampled = _generation(trained, prompts, groups or {})
            summary["generation"][name] = section
            answers += sampled
            texts = [one["answer"] for one in sampled]
            by_model[name] = {
                one["user"]: texts[i : i + len(prompts)] for i, one in enumerate(sampled) if not i % len(prompts)
            }
            if role and sampled:
                users = [one["user"] for one in sampled[:: len(prompts)]]
                who = [user for user in users for _ in prompts]
                asked = [example.original for _ in users for example in prompts]
                summary["role_play"][name] = role(who, asked, texts, base * len(users))
            first = {one["user"]: one["answer"] for one in sampled if one["prompt"] == sampled[0]["prompt"]}
            samples.append({"prompt": prompts[0].original, "model": name, "answers": first})
    for name, against in _pooled_models(run, config.surface).items():
        one, other = (summary["accuracy"][model]["users"] for model in (name, against))
        options = {key: settings[key] for key in ("resamples", "seed")}
        summary["gain"][name] = {"against": against, **paired_gain(one, other, **options)}
        if groups and by_model.get(name) and by_model.get(against):
            rates = _win_rates(run, pairs, prompts, by_model[name], by_model[against], options)
            summary["people_win_rate"][name] = {"against": against, **rates}
    if groups and not run.section(PopulationSettings).mixture:  # mixtures also differ within a persona
        counts = list(groups.values())
        summary["ceiling"] = {"majority_fraction": max(counts.count(persona) for persona in set(counts)) / len(counts)}
    if role:
        summary["judges"] = [role.report()]
    finish(run, "evaluate_users", started, summary, samples, answers)
    return {"pairs": len(held), "users": len(pairs.registry.rows)}


def check_people(run: Run) -> None:
    """Raises UserError where the columns of your own comparisons cannot describe people to the judge."""
    data = run.section(PreferenceSettings).data
    if not isinstance(data, str):
        descriptions(run.records.comparisons(data, "preference.data")[0], run.section(UsersSettings).person_columns)


def _role(run: Run, pairs: Pairs, personas: Mapping[str, str]) -> RolePlay:
    """The judge in the place of people: simulated ones are what their preferences say, others what records tell."""
    config, sentences = run.section(UsersSettings), run.audience.sentences
    people = {user: sentences[persona] for user, persona in personas.items() if sentences.get(persona)}
    if not people:
        people = descriptions([e for table in pairs.tables.values() for e in table.examples], config.person_columns)
    return RolePlay(run, config.judge, people, config.resamples)


def _base_answers(run: Run, examples: Sequence[Example]) -> list[str]:
    """An answer of the base to the prompt of each example."""
    keys = functools.partial(run.streams.key, "evaluate_users/base_answers")
    longest = run.section(UsersSettings).max_new_tokens or run.settings.data.max_completion
    sampler = run.sampler(sampling=run.text.sampling(max_new_tokens=longest))
    return sampler("evaluate_users: answers of the base", [example.prompt for example in examples], keys)


def _score(
    summary: dict[str, Any],
    name: str,
    own: np.ndarray,
    generic: np.ndarray | None,
    examples: Sequence[Example],
    *,
    questions: bool,
    settings: dict[str, Any],
) -> None:
    """Adds what the held-out margins of one model, [N] as seen by each pair's user and by the generic one, tell."""
    names = np.array([example.user_id for example in examples])
    with progress(f"evaluate_users: bootstrap of {name}", 1):
        found = user_accuracy(own, names, **settings)
    found["generic"] = found["mean"] if generic is None else user_accuracy(generic, names, **settings)["mean"]
    summary["accuracy"][name] = found
    chosen, rejected = (np.array([len(text_of(getattr(example, side))) for example in examples]) for side in SIDES)
    summary["length_matched"][name] = length_matched(own, names, chosen, rejected, **settings)
    if questions:
        asked = np.array([example.extra["question"] for example in examples])
        options = {key: settings[key] for key in ("resamples", "seed")}
        summary["choices"][name] = choice_accuracy(own, asked, **options)


def _surface(pairs: Pairs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Held-out margins (own, generic) of logistic regressions on surface features, for everybody and per person."""
    features, people = {}, {}
    for part in ("train", "heldout"):
        kept = [i for i, example in enumerate(pairs.tables[part].examples) if not is_tie(example)]
        examples = [pairs.tables[part].examples[i] for i in kept]
        rows = [(request_of(e.prompt), *(text_of(getattr(e, side)) for side in SIDES)) for e in examples]
        features[part] = np.array([surface.features(p, c) - surface.features(p, r) for p, c, r in rows])
        people[part] = pairs.users(part)[kept]
    train, held = people["train"], people["heldout"]
    found = {}
    for name, users in (("surface", np.zeros_like(train)), ("surface_personal", train)):
        weights = surface.fit(features["train"], users, pairs.registry.capacity)
        found[name] = tuple(surface.margins(weights, features["heldout"], who) for who in (held, np.zeros_like(held)))
    return found


def _pooled_models(run: Run, surface: bool) -> dict[str, str]:
    """The model that does not know people apart, for each that may, of the same kind of head."""
    config = run.section(PreferenceSettings)
    entries = {name: config.entry(name) for name in config.models}
    pooled: dict[str, str] = {}
    for name, entry in entries.items():
        if entry.users.kind == "uniform" and not (entry.users.user_text or entry.users.read):
            pooled.setdefault(entry.objective.head, name)
    found = {name: pooled.get(entry.objective.head) for name, entry in entries.items()}
    found |= {"surface_personal": "surface"} if surface else {}
    return {name: against for name, against in found.items() if against not in (None, name)}


def _by_people(trained: Trained, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Held-out accuracy by how many comparisons people were trained on and, where they say who they are, by whether
    their comparisons contradict it.
    """
    held, train = (trained.pairs.tables[part].examples for part in ("heldout", "train"))
    names = [str(example.user_id) for example in held]
    given = collections.Counter(str(example.user_id) for example in train)
    kinds = {"comparisons": by_powers_of_two({name: given[name] for name in names})}
    says = {str(e.user_id): e.extra["contradicts"] for e in held if "contradicts" in e.extra}
    if any(says.values()):
        kinds["stated"] = {name: "contradicts" if contradicts else "agrees" for name, contradicts in says.items()}
    margins = trained.margins("heldout", trained.pairs.users("heldout"))
    options = {key: settings[key] for key in ("resamples", "seed")}
    return {name: accuracy_by(margins, names, found, **options) for name, found in kinds.items()}


def _size(trained: Trained) -> dict[str, int]:
    """Rows of the user table without the generic user's, how many are taken, and bytes of the table and adapters."""
    table = jax.tree.leaves(trained.trainable["users"].get("table", {}))
    return {
        "rows": trained.pairs.registry.capacity,
        "people": len(trained.pairs.registry.rows),
        "table_bytes": sum(x.nbytes for x in table),
        "adapter_bytes": sum(x.nbytes for x in jax.tree.leaves(trained.trainable["bank"])),
    }


def _grid(trained: Trained) -> dict[str, float]:
    """Accuracy of seen and unseen users on seen and unseen prompts; unseen users are the generic one."""
    pairs, most = trained.pairs, trained.run.section(UsersSettings).grid_pairs
    hits: dict[str, list[bool]] = {}
    for part, table in pairs.tables.items():
        users = pairs.users(part)
        cells: dict[str, list[int]] = {}
        for i, example in enumerate(table.examples):
            new = part == "heldout" or (part == "new_users" and bool(example.held_out))
            name = f"{'seen' if users[i] else 'unseen'}_user_{'unseen' if new else 'seen'}_prompt"
            cells.setdefault(name, []).append(i)
        for name, rows in cells.items():
            # Evenly spaced, for the file is ordered by user.
            rows = rows[:: max(1, len(rows) // most)]
            hits.setdefault(name, []).extend(trained.margins(part, users, rows) > 0)
    return {name: float(np.mean(fractions)) for name, fractions in hits.items()}


def _generation(
    trained: Trained, examples: Sequence[Example], groups: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Length and judge scores of answers to the prompts of `examples` as every trained user in the data, and all
    answers.
    """
    run, present = trained.run, trained.pairs.people
    users = [user for user in trained.pairs.registry.rows if user in present]
    if not users:
        return {}, []
    answers = trained.answers([example.prompt for example in examples], users)
    personas = sorted(set(groups.values()))
    section = {}
    for user, texts in zip(users, answers, strict=True):
        scores = {
            persona: float(
                np.mean(
                    [run.audience.score(e.original, text, persona) for e, text in zip(examples, texts, strict=True)]
                )
            )
            for persona in personas
        }
        length = float(np.mean([len(text.split()) for text in texts]))
        section[user] = {"group": groups.get(user), "answers": len(texts), "length": length, "score": scores}
    kept = [
        {"model": trained.entry.name, "user": user, "prompt": e.prompt, **columns_of(e.prompt), "answer": text}
        for user, texts in zip(users, answers, strict=True)
        for e, text in zip(examples, texts, strict=True)
    ]
    return section, kept


def _win_rates(
    run: Run,
    pairs: Pairs,
    examples: Sequence[Example],
    own: Mapping[str, Sequence[str]],
    others: Mapping[str, Sequence[str]],
    options: Mapping[str, int],
) -> dict[str, Any]:
    """How often simulated people prefer answers to those of another model, by the rule that labelled their comparisons:
    a policy may follow a person less well than its margins rank given answers (arXiv 2512.23067).

    Args:
      examples: whose prompts were answered.
      own, others: person -> an answer to each prompt.

    Returns:
      the dict of `users.rate_of_people`, and "groups", the same of the people of each persona.
    """
    known = {str(e.user_id): e.extra for table in pairs.tables.values() for e in table.examples}
    labels = Labels(run)
    if any("taste" in known[user] for user in own):
        labels.calibrate(run.section(PopulationSettings).personas, list(map(_triple, pairs.tables["train"].examples)))
    gaps = [
        labels.gap(known[user].get("taste") or {known[user]["persona"]: 1.0}, as_request(example.original), *texts)
        for user in own
        for example, *texts in zip(examples, own[user], others[user], strict=True)
    ]
    users = np.repeat(list(own), len(examples))
    verdicts, personas = np.where(np.abs(gaps) <= TIE, 0.0, np.sign(gaps)), [known[user]["persona"] for user in users]
    groups = {one: np.array([persona == one for persona in personas]) for one in sorted(set(personas))}
    of_groups = {one: rate_of_people(verdicts[rows], users[rows], **options) for one, rows in groups.items()}
    return {**rate_of_people(verdicts, users, **options), "groups": of_groups}


def _triple(example: Example) -> Triple:
    """The request of a comparison and its two answers."""
    return as_request(example.original), text_of(example.chosen or ""), text_of(example.rejected or "")


STAGE = Stage("evaluate_users", run, UsersSettings, writes="report/summary.json")
