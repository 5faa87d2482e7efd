"""SHP and ComPRed: pairs of comments on Reddit posts, judged by the votes of a community, which is the user here."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator

from pjrlhf.data.readers.raw import Raw, Row
from pjrlhf.data.readers.reader import DataReader, ReaderSettings, Record, converted, field, number, text
from pjrlhf.data.records import RecordError
from pjrlhf.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunitySettings(ReaderSettings):
    """Pairs of comments."""

    min_score_ratio: float = setting(2.0, "least ratio of the votes of the two comments; 1 keeps all pairs", low=1.0)
    max_pairs_per_post: int = setting(5, "most pairs of one post; 0 keeps all", low=0)
    seed: int = setting(0, "of the draw of the pairs of a post", low=0)


def pair(row: Row) -> Record:
    """The record of a row.

    Raises:
      RecordError: a column is missing or null, a text is empty, `labels` is neither 0 nor 1, or the comments are equal.
    """
    label = number(row, "labels")
    if label not in (0, 1):
        raise RecordError("bad labels", f"{label:g} is neither 0 nor 1")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    chosen, rejected = (text(row, f"human_ref_{side}") for side in (better, worse))
    if chosen == rejected:
        raise RecordError("chosen equals rejected")
    title, body = (str(row.get(name) or "").strip() for name in ("title", "history"))
    if not (title or body):
        raise RecordError("empty history")
    return {
        "prompt": "\n".join(part for part in (title, body) if part),
        "chosen": chosen,
        "rejected": rejected,
        "user_id": community(text(row, "domain")),
        "score_ratio": number(row, "score_ratio"),
    }


def community(domain: str) -> str:
    """The name of a subreddit: SHP adds the split to it, as in "askculinary_train"."""
    for suffix in ("_train", "_validation", "_test"):
        domain = domain.removesuffix(suffix)
    return domain


def _read(settings: CommunitySettings, raw: Raw) -> Iterator[Row | RecordError]:
    split = settings.split
    if raw.kind == "compred" and not split.endswith("_pref"):  # beside them stand posts with single comments
        split += "_pref"
    hub = {"split": split}
    if raw.kind == "shp" and settings.name:
        hub = {"name": None, "data_dir": settings.name}
    pattern = f"{settings.name}/*" if settings.name else "*"
    rows = raw(pattern, split=split if raw.kind == "compred" else settings.split, hub=hub)
    posts: dict[str, list[tuple[bytes, int]]] = collections.defaultdict(list)
    found: list[Row | RecordError] = []
    for item in converted(rows, lambda row: _pairs(row, settings, raw)):
        if isinstance(item, Row):
            post = item.pop("post_id")
            draw = hashlib.sha256(f"{settings.seed}\0{post}\0{item['chosen']}\0{item['rejected']}".encode()).digest()
            posts[post].append((draw, len(found)))
        found.append(item)
    most = settings.max_pairs_per_post or len(found)
    left_out = {i for pairs in posts.values() for _, i in sorted(pairs)[most:]}
    raw.drop("further pairs of a post", len(left_out))
    yield from (item for i, item in enumerate(found) if i not in left_out)


def _pairs(row: Row, settings: CommunitySettings, raw: Raw) -> list[Record]:
    record = pair(row)
    if record["score_ratio"] < settings.min_score_ratio:
        raw.drop("pairs below min_score_ratio")
        return []
    return [{**record, "post_id": str(field(row, "post_id"))}]


_MAPPING = {
    "prompt": "title (ComPRed) and history, the post",
    "chosen": "human_ref_A where labels is 1, else human_ref_B",
    "rejected": "the other comment",
    "user_id": "domain, the subreddit, without the split",
}
_TRAPS = (
    "labels = 1 means that comment A is preferred, not that it is the second one",
    "posts have up to hundreds of pairs of few comments: max_pairs_per_post keeps 5, score ratios below "
    "min_score_ratio are left out, as ComPO does; both are counted",
)

READERS = {
    "shp": DataReader(
        kind="shp",
        settings=CommunitySettings,
        read=_read,
        title="Stanford Human Preferences (arXiv 2110.08420): comments in 18 communities; name: one subreddit",
        home="https://huggingface.co/datasets/stanfordnlp/SHP",
        licence="MIT of the set; texts under Reddit's terms",
        mapping=_MAPPING,
        traps=(*_TRAPS, "domain holds the split (askculinary_train): it is cut off, so that a community is one user"),
    ),
    "compred": DataReader(
        kind="compred",
        settings=CommunitySettings,
        read=_read,
        title="ComPRed (ComPO, arXiv 2410.16027): comments in communities of five fields; name: the field",
        home="https://huggingface.co/datasets/allenai/compred",
        licence="ODC-BY",
        mapping=_MAPPING,
        traps=(
            *_TRAPS,
            "preference parts are called train_pref, validation_pref, test_pref: `split` may leave out _pref",
        ),
    ),
}
