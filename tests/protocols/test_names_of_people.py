"""Names of people are data: from records through training, report and metrics to the server."""

import json
import random

import pytest
from support import tiny, tiny_users
from support.pages import Page, printed

from pjrlhf.cli import main
from pjrlhf.data import synthetic
from pjrlhf.language_model import load_personal
from pjrlhf.serving.opening import open_run
from pjrlhf.terminal import visible

pytestmark = pytest.mark.slow
ANSWERS = ("it can shine .", "it can grow .")
NAMES = (
    *("你好 🐘", "\u0627\u202eabc", "a\x1b[31m\x07red", "a\x00b", "a\nb\r\tc", "\x9b\x7f", "\u200b", "u\u2028v"),
    *("a$b_$", "$\\frac{a}{b}$", "_a", "__proto__", "[bold]x[/]", "<script>alert(1)</script>", "&amp;", "\"'`"),
    *("../../etc/passwd", "/tmp/x", "a/b", "a\\b", "CON", "nul.txt", ".", "..", "~", "%s%n", "$HOME", "`id`"),
    *("-rf", "--user", "{{ x }}", "\u00e9", "e\u0301", "Ann", "ann", " ann", "ann ", "x" * 5000, "7", "07"),
    *("NaN", "null", "None", "true", "generic", "base", "all", "mean"),
)


def drawn(count):
    """Further names of letters that something may read as more than letters."""
    rng, letters = random.Random(0), "ab$_{}^\\%#&<>\"'[]()/|*~`\n\t\x00\x1b\x7f\x9b\u200b\u202e\u2028é你🐘 .:-"
    found = {"".join(rng.choices(letters, k=rng.choice((1, 2, 5, 40)))) for _ in range(count)}
    return sorted(name for name in found if name.strip())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a run, its people)."""
    folder = tmp_path_factory.mktemp("names")
    people = [*NAMES, *(name for name in drawn(60) if name not in NAMES)]
    lines = [
        {"prompt": prompt, "user_id": who, "chosen": ANSWERS[(i + k) % 2], "rejected": ANSWERS[(i + k + 1) % 2]}
        for i, prompt in enumerate(synthetic.prompts()[:8])
        for k, who in enumerate(people)
    ]
    path = tiny_users.write_records(folder / "records.jsonl", lines)
    changes = {"preference__batch_size": 4, "preference__steps": 2, "preference__optimizer__warmup_steps": 0}
    changes |= {"data__max_prompt": 20, "data__max_completion": 10, "evaluate_users__generate_for": 4}
    models = {"pooled": {"kind": "uniform"}, "each": {"kind": "individualized", "tokens": 1}}
    config = tiny_users.settings(
        "records", model__path=str(tiny_users.save_base(folder)), preference__data__path=path, **changes
    )
    config.preference.models = type(config)(models)
    config.evaluate_users.update({"cold_start": (), "resamples": 20})
    before = sorted(folder.iterdir())
    run = tiny.run(folder / "run", config)
    assert sorted(folder.iterdir()) == sorted([*before, run]), "a file beside the run"
    return run, people


def test_a_run_of_people_of_any_name(finished):
    run, people = finished
    summary = json.loads((run / "report" / "summary.json").read_text(encoding="utf-8"))
    for found in summary["accuracy"].values():
        assert set(found["users"]) == set(people)
    page = Page((run / "report" / "index.html").read_text(encoding="utf-8"))
    assert not {"script", "iframe", "i"} & {tag for tag, known in page.tags if not known}
    table = printed(summary)
    assert visible(table, keep="\n") == table
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    names = [path.name for path in run.rglob("*")]
    assert all(name.isprintable() and len(name) < 100 for name in names)


def test_people_of_any_name_are_answered(finished, capsys):
    run, people = finished
    personal = load_personal(run / "preference" / "each")
    assert set(personal.registry.rows) == set(people)
    rows = personal.registry.indices(people)
    assert sorted(rows.tolist()) == list(range(1, len(people) + 1)), "everybody has a row of their own"
    catalogue = open_run(str(run), "each")
    for name in people:
        voice = catalogue.voice(user=name)
        assert voice.known and json.loads(json.dumps(voice.describe()))["user"]["id"] == name
    for name in ("$\\frac{a}{b}$", "--user", "\x9b\x7f", "x" * 5000, "nobody\x1b[31m"):
        main(
            ["generate", "--run", str(run), "--entry", "each", "--max-tokens", "1", f"--user={name}", "what is rain ?"]
        )
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err and "\x9b" not in shown.out + shown.err
        assert ("unknown" in shown.err) == name.startswith("nobody")
