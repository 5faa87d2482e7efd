"""TL;DR summaries of Reddit posts, compared and rated by workers with ids (Stiennon et al., arXiv 2009.01325).

`labels="length"` with `policies="supervised"` gives the conflicting preferences of P-RLHF (arXiv 2402.05133, 5.1).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting

AXES = ("overall", "accuracy", "coverage", "coherence")
PARTS = {"validation": ("valid1", "valid2"), "valid": ("valid1", "valid2"), "all": ()}  # split -> `split` of rows
# Reason why a comparison is no record -> what is counted.
_DROPPED = {"chosen equals rejected": "equal summaries", "equal lengths": "summaries of equal length"}
LONGER = 0.7  # probability that a worker prefers longer summaries


def _plain_post(info: Mapping[str, Any], post: str) -> str:
    return post


def _tldr(info: Mapping[str, Any], post: str) -> str:
    """The prompt of OpenAI's policies; a line whose field is missing (articles have no subreddit) is left out."""
    named = {"SUBREDDIT: r/": info.get("subreddit"), "TITLE: ": info.get("title"), "POST: ": post}
    return "".join(f"{label}{value}\n" for label, value in named.items() if value) + "TL;DR:"


def _summarize(info: Mapping[str, Any], post: str) -> str:
    return f"Summarize the following text:\n{post}"


# `prompt` -> (info of a row, its post) -> the prompt.
PROMPTS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "tldr": _tldr,
    "post": _plain_post,
    "summarize": _summarize,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TldrSettings(ReaderSettings):
    """Comparisons and ratings of summaries; `split` is train, valid1, valid2, validation (both) or all."""

    gives: str = setting(
        "pairs",
        "the comparisons; or of the ratings on four axes single summaries with rewards, or pairs per worker and axis",
        choices=("pairs", "axes", "axis_pairs"),
    )
    articles: bool = setting(False, "also summaries of CNN/DM articles, beside those of posts")
    policies: str = setting(
        "all", "whose summaries: all, or of supervised policies alone, as P-RLHF", choices=("all", "supervised")
    )
    workers: int = setting(0, "only workers with the most training comparisons, so many; 0 keeps all", low=0)
    others: str = setting(
        "drop",
        "what happens to the other workers: dropped; or kept, as people that a model has never met",
        choices=("drop", "keep"),
    )
    labels: str = setting(
        "annotators",
        "who labels: the annotators; or each worker by length, for longer or shorter summaries, as P-RLHF",
        choices=("annotators", "length"),
    )
    seed: int = setting(3456, "of the draw of each worker's preferred length", low=0, high=2**32 - 1)
    prompt: str = setting("tldr", "form of the prompt", choices=tuple(PROMPTS))


def lengths_preferred(workers: Sequence[str], seed: int = 3456) -> dict[str, str]:
    """Who prefers "longer" and who "shorter" summaries: one draw each, longer with probability 0.7.

    Args:
      workers: by descending number of training comparisons, which is the order of the draws.
      seed: with that of P-RLHF, 3456, the draws are those of its published experiment.
    """
    draws = np.random.RandomState(seed).random_sample(len(workers))  # a legacy generator, for the same draws
    return {name: "longer" if draw < LONGER else "shorter" for name, draw in zip(workers, draws, strict=True)}


def by_count(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The workers of comparisons by descending number of training comparisons; equal ones by name."""
    counts = collections.Counter({str(row.get("worker")): 0 for row in rows})
    counts.update(str(row.get("worker")) for row in rows if row.get("split") == "train")
    return [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _is_supervised(row: Row) -> bool:
    """Whether both summaries are of supervised policies for posts, by the names of the policies."""
    summaries = row.get("summaries")
    known = summaries if isinstance(summaries, list) else []  # what else it may be is told by `pair`
    names = [str(one.get("policy")) for one in known if isinstance(one, Mapping)]
    return all("sup" in name and "ppo" not in name and "cnn" not in name for name in names)


def _info(row: Row, settings: TldrSettings) -> Record:
    """What all records of a row have: prompt, worker and post.

    Raises:
      RecordError: a post or worker is missing.
    """
    info = field(row, "info")
    if not isinstance(info, Mapping):
        raise RecordError("info is no object")
    post = text(info, "article" if is_article(info) else "post").strip()
    return {
        "prompt": PROMPTS[settings.prompt](info, post),
        "user_id": str(field(row, "worker")),
        "group": str(field(info, "id")),
    }


def is_article(info: Mapping[str, Any]) -> bool:
    """Whether a row is about a CNN/DM article."""
    return info.get("post") is None and info.get("article") is not None


def pair(row: Row, settings: TldrSettings, prefers: str | None = None) -> Record:
    """The record of a comparison.

    Args:
      prefers: "longer" or "shorter" of the summaries, in characters; None for the annotator's choice.

    Raises:
      RecordError: something is missing; not two summaries; a choice that is neither 0 nor 1; equal summaries; or
        summaries of equal length where the length decides ("equal lengths").
    """
    summaries = field(row, "summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise RecordError("not two summaries", f"found {len(summaries) if isinstance(summaries, list) else summaries}")
    texts = [text(one, "text") for one in summaries]
    if texts[0] == texts[1]:
        raise RecordError("chosen equals rejected")
    if prefers:
        sizes = [len(one) for one in texts]
        if sizes[0] == sizes[1]:
            raise RecordError("equal lengths")
        choice = sizes.index(max(sizes) if prefers == "longer" else min(sizes))
    else:
        choice = field(row, "choice")
        if choice not in (0, 1) or isinstance(choice, bool):
            raise RecordError("bad choice", f"{choice!r} is neither 0 nor 1")
    found = {**_info(row, settings), "chosen": texts[choice], "rejected": texts[1 - choice]}
    confidence = (row.get("extra") or {}).get("confidence")
    return found if confidence is None or prefers else {**found, "confidence": confidence}


def _pairs(settings: TldrSettings, raw: Raw) -> Iterator[Row | RecordError]:
    wanted = _parts(settings)
    rows = [row for row in raw("comparisons/*" if not raw.is_file else "*", split=None, hub={"name": "comparisons"})]
    good = [row for row in rows if isinstance(row, Row) and _is_kept(row, settings, raw)]
    ranked = by_count(good)
    known = set(ranked[: settings.workers] if settings.workers else ranked)
    lengths = lengths_preferred(ranked, settings.seed) if settings.labels == "length" else {}
    yield from (row for row in rows if isinstance(row, RecordError))
    for row in good:
        worker = str(row.get("worker"))
        if wanted and row.get("split") not in wanted:
            continue
        if worker not in known and settings.others == "drop":
            raw.drop("comparisons of other workers")
            continue
        convert = functools.partial(_distinct, settings=settings, prefers=lengths.get(worker), raw=raw)
        yield from converted([row], convert)


def _distinct(row: Row, settings: TldrSettings, prefers: str | None, raw: Raw) -> list[Record]:
    """The record of a row; equal summaries, and equal lengths where they decide, are dropped and counted."""
    try:
        return [pair(row, settings, prefers)]
    except RecordError as error:
        if error.reason not in _DROPPED:
            raise
        raw.drop(_DROPPED[error.reason])
        return []


def _is_kept(row: Row, settings: TldrSettings, raw: Raw) -> bool:
    info = row.get("info")
    if not settings.articles and isinstance(info, Mapping) and is_article(info):
        raw.drop("articles")
        return False
    if settings.policies == "supervised" and not _is_supervised(row):
        raw.drop("comparisons with other policies")
        return False
    return True


def _parts(settings: TldrSettings) -> tuple[str, ...]:
    """The values of `split` in the rows that are read; () for all."""
    return PARTS.get(settings.split, (settings.split,))


def rating(row: Row, settings: TldrSettings) -> Record:
    """The record of a rated summary: `rewards` on those of `AXES` that were judged.

    Raises:
      RecordError: something is missing, or no axis was judged.
    """
    axes = field(row, "summary", "axes")
    if not isinstance(axes, Mapping):
        raise RecordError("axes is no object")
    rewards = {name: number(axes, name) for name in AXES if axes.get(name) is not None}
    if not rewards:
        raise RecordError("no axis was judged")
    return {**_info(row, settings), "completion": text(row, "summary", "text"), "rewards": rewards}


def _ratings(settings: TldrSettings, raw: Raw) -> Iterator[Row | RecordError]:
    wanted = _parts(settings)

    def convert(row: Row) -> list[Record]:
        info = row.get("info")
        if (wanted and row.get("split") not in wanted) or not isinstance(info, Mapping):
            return [] if isinstance(info, Mapping) else [rating(row, settings)]
        if not settings.articles and is_article(info):
            raw.drop("articles")
            return []
        return [rating(row, settings)]

    rows = raw("axis_evals/*" if not raw.is_file else "*", split=None, hub={"name": "axis"})
    found = converted(rows, convert)
    if settings.gives == "axes":
        yield from found
        return
    groups: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for item in found:
        if isinstance(item, Row):
            groups[item["group"], item["user_id"]].append(item)
        else:
            yield item
    for summaries in groups.values():
        yield from _axis_pairs(summaries, raw)


def _axis_pairs(summaries: Sequence[Row], raw: Raw) -> Iterator[Row]:
    """Pairs of the summaries of one post that one worker rated, for every axis that tells them apart."""
    for i, first in enumerate(summaries):
        for second in summaries[i + 1 :]:
            if first["completion"] == second["completion"]:
                raw.drop("equal summaries")
                continue
            for axis in AXES:
                scores = [one["rewards"].get(axis) for one in (first, second)]
                if None in scores:
                    continue
                if scores[0] == scores[1]:
                    raw.drop("equal ratings")
                    continue
                better, worse = (first, second) if scores[0] > scores[1] else (second, first)
                shared = {name: first[name] for name in ("prompt", "user_id", "group")}
                answers = {"chosen": better["completion"], "rejected": worse["completion"]}
                yield Row(
                    {**shared, **answers, "objective": axis, "margin": abs(scores[0] - scores[1]) / 6},  # of 1 to 7
                    first.where,
                )


def _read(settings: TldrSettings, raw: Raw) -> Iterator[Row | RecordError]:
    return _pairs(settings, raw) if settings.gives == "pairs" else _ratings(settings, raw)


READER = DataReader(
    kind="tldr",
    settings=TldrSettings,
    read=_read,
    title="TL;DR comparisons and ratings with worker ids (Learning to summarize, arXiv 2009.01325)",
    home="https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/",
    licence="Modified MIT; the posts CC BY 4.0",
    mapping={
        "prompt": "info.subreddit, info.title and info.post (or info.article), in the form that `prompt` names",
        "chosen": "summaries[choice].text; with labels=length the longer or the shorter one, in characters",
        "rejected": "the other summary",
        "user_id": "worker",
        "rewards": "axis_evals: summary.axes, 1 to 7",
        "objective": "axis_evals, pairs: the axis",
        "margin": "axis_evals, pairs: the difference of the ratings / 6",
    },
    traps=(
        "on the hub the set is a script, which `datasets` 4 refuses: read the raw files comparisons/batch*.json and "
        "axis_evals/*.json, which are JSON lines",
        "`split` stands in the rows, not in file names; valid1 chose the models of the paper and valid2 tested them",
        "CNN/DM articles stand among the posts: left out and counted",
        "equal summaries are dropped; with labels=length also different ones of equal length (P-RLHF takes the first)",
        "workers are ranked by training comparisons of the filtered set, also where another split is read",
        "summaries begin with a blank, which is what follows `TL;DR:`",
        "axes that were not judged are null",
    ),
)
