"""Random records and random names: every case ends in success or in one line. Seeded and bounded."""

import collections
import csv
import gzip
import io
import json
import random

import pytest
from support.pages import Page, printed
from support.summaries import SUMMARY, USER_MODELS

from pjrlhf.data import synthetic
from pjrlhf.data.records import as_json
from pjrlhf.data.schema import COLUMNS, KINDS, validate
from pjrlhf.data.sources import open_source
from pjrlhf.data.token_table import Lengths, tokenize
from pjrlhf.data.tokenization import load_tokenizer
from pjrlhf.errors import UserError
from pjrlhf.evaluation import report
from pjrlhf.evaluation.users import user_accuracy
from pjrlhf.models.registry import UserRegistry
from pjrlhf.terminal import line, visible

pytestmark = pytest.mark.slow

TEXTS = (
    *(
        "",
        " ",
        "a",
        "it can shine .",
        "\n\nHuman: a\n\nAssistant: b",
        "</s>",
        "<s>",
        "\x00",
        "\x1b[31mred",
        "\ud800",
        "\udc00",
    ),
    *(
        "é",
        "e\u0301",
        "🐘",
        "\u202eabc",
        "\u200b",
        "a\r\nb",
        "$x_$",
        "_",
        "{{ x }}",
        "{% raise %}",
        "x" * 5000,
        "NaN",
        "null",
    ),
)
NUMBERS = (0, -1, 1, 2**63, -(2**64), 10**400, 0.5, 1e308, float("nan"), float("inf"), True, False)
ASKED, BETTER, WORSE = "what is rain ?", "it can shine .", "it can grow ."
ROLES = ("user", "assistant", "system", "tool", "User", "", None, 3)


def leaf(rng):
    return rng.choice((rng.choice(TEXTS), rng.choice(NUMBERS), None, [], {}))


def value(rng, depth=0):
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        return leaf(rng)
    if kind < 0.65:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.8:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    if kind < 0.97:
        return [{"role": rng.choice(ROLES), "content": leaf(rng)} for _ in range(rng.randint(0, 4))]
    found = leaf(rng)
    for _ in range(rng.choice((50, 200, 3000))):
        found = [found]
    return found


def good(rng):
    """A record that can be used, more often than not."""
    record = {
        "prompt": "what is rain ?",
        "chosen": "it can shine .",
        "rejected": "it can grow .",
        "completion": "it can .",
    }
    if rng.random() < 0.3:
        record["prompt"] = [{"role": "user", "content": record["prompt"]}]
    return record | {"user_id": rng.choice(("ann", 7, "bob", 2**70)), "note": leaf(rng)}


def mutated(rng):
    """A good record with some columns exchanged, lost, added or renamed."""
    record = good(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        name = rng.choice((*COLUMNS, *TEXTS[:6]))
        if rng.random() < 0.3:
            record.pop(name, None)
        else:
            record[name] = value(rng)
    return record if rng.random() < 0.95 else value(rng)


def dumped(rng, record):
    try:
        text = json.dumps(record, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        text = "[" * 100_000
    coding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
    return text.encode(coding, "replace" if coding == "latin-1" or rng.random() < 0.5 else "surrogatepass")


def damaged(rng, content):
    """Bytes as they are, most of the time; or cut, overwritten, compressed, or compressed and then damaged."""
    kind = rng.random()
    if kind < 0.6:
        return content
    if kind < 0.7:
        return content[: rng.randrange(len(content) + 1)]
    if kind < 0.8 and content:
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at + 1 :]
    packed = gzip.compress(content)
    return packed if kind < 0.9 else packed[: rng.randrange(len(packed))] + rng.randbytes(rng.randint(0, 4))


def jsonl(rng, folder):
    records = [mutated(rng) for _ in range(rng.randint(0, 6))]
    content = b"\n".join(dumped(rng, record) for record in records)
    (folder / "a.jsonl").write_bytes(damaged(rng, content))
    return {"kind": "jsonl", "path": str(folder / "a.jsonl")}


def votes(rng, folder):
    pairs = [{"id": rng.choice((1, 2, 3, "x")), "prompt": ASKED, "left": BETTER, "right": WORSE} for _ in range(3)]
    pairs = [
        pair if rng.random() < 0.8 else pair | {rng.choice(("id", "left", "prompt")): value(rng)} for pair in pairs
    ]
    (folder / "pairs.jsonl").write_bytes(damaged(rng, b"\n".join(dumped(rng, pair) for pair in pairs)))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("id", "worker", "winner")[: rng.choice((3, 3, 3, 2))])
    for _ in range(rng.randint(0, 6)):
        winner = rng.choice(("left", "right", "LEFT", "tie", "", "both", "x"))
        writer.writerow((rng.choice((1, 2, 3, "x", "", 9)), rng.choice(("ann", "", *TEXTS[:9])), winner))
    (folder / "votes.csv").write_bytes(damaged(rng, text.getvalue().encode("utf-8", "surrogatepass")))
    return {"kind": "votes", "path": str(folder / "pairs.jsonl"), "votes": str(folder / "votes.csv")}


def choices(rng, folder):
    rows = [
        {"question": ASKED, "preference": "keep it short .", "options": [BETTER, WORSE, "it can ."]} for _ in range(3)
    ]
    rows = [row if rng.random() < 0.7 else row | {rng.choice((*row, "x")): value(rng)} for row in rows]
    (folder / "q.json").write_bytes(damaged(rng, dumped(rng, rows if rng.random() < 0.9 else value(rng))))
    return {"kind": "choices", "path": str(folder / "q.json")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    synthetic.write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("make", [jsonl, votes, choices], ids=lambda make: make.__name__)
def test_records_of_every_kind_are_used_or_refused_in_one_line(tmp_path, tokenizer, make):
    ended = collections.Counter()
    for seed in range(700):
        rng = random.Random(f"{make.__name__} {seed}")
        kind = rng.choice(KINDS) if make is jsonl else "preference"
        spec = make(rng, tmp_path)
        try:
            columns = {"chosen": rng.choice(TEXTS[:6]), "user_id": "who"} if rng.random() < 0.1 else None
            examples, _ = validate(
                open_source(spec, "sft.data"), kind, columns=columns, max_bad_fraction=rng.choice((0, 1))
            )
            for example in examples:
                json.dumps(vars(example)).encode("utf-8")
                assert UserRegistry.create([str(example.user_id)], 3)
            table = tokenize(examples, kind, tokenizer, Lengths(prompt=2000, completion=2000), max_bad_fraction=1.0)
            ended["used"] += len(table) > 0
        except UserError as error:
            told = line(error)
            assert visible(told) == told and len(told) < 2000, seed
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {spec}") from error
    print(make.__name__, dict(ended))
    assert ended["used"] > 10 and ended["refused"] > 70, ended


LETTERS = "ab$_{}^\\%#&<>\"'[]()/|*~`\n\t\x00\x1b\x7f\x9b\u200b\u202e\u2028é你🐘 .:-"


def renamed(found, names):
    if isinstance(found, dict):
        return {names.get(key, key): renamed(one, names) for key, one in found.items()}
    if isinstance(found, list | tuple):
        return [renamed(one, names) for one in found]
    return names.get(found, found) if isinstance(found, str) else found


@pytest.mark.filterwarnings("error")
def test_people_models_and_criteria_may_have_any_name(tmp_path):
    whole = as_json(SUMMARY | USER_MODELS)
    for seed in range(12):
        rng = random.Random(seed)
        old = ("ann", "bob", "pooled", "short", "P3A", "P1A", "P1B", "expertise", "Soups", "Base", "P1A+P2A", "sft")
        new = {name: "".join(rng.choices(LETTERS, k=rng.choice((1, 3, 12, 80)))) for name in old}
        if len(set(new.values())) < len(new):
            continue
        people = sorted(new.values())
        user_accuracy([1.0, -1.0] * len(people), sorted(people * 2), resamples=20)
        summary = renamed(whole, new)
        sample = {"model": new["pooled"], "prompt": new["ann"], "answers": {new["ann"]: new["bob"]}}
        page = Page(report.write_report(tmp_path, summary, [sample]).read_text(encoding="utf-8"))
        shown = "".join(page.text)
        assert not {"script", "iframe"} & {tag for tag, _ in page.tags}
        assert all(name.strip().split("\x00")[0].split("\n")[0][:20] in shown for name in new.values()), seed
        table = printed(summary)
        assert visible(table, keep="\n") == table, seed
