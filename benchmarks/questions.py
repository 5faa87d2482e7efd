"""Which comparison to ask a new person for next: `python benchmarks/questions.py --run RUN --people FILE.jsonl`.

Every new person has a pool of comparisons that they could be asked for, and held-out ones. Starting from the generic
user, one comparison after the other is asked, the row is fitted as the server fits it, and the held-out accuracy is
measured: in random order, and by the largest expected information (pjrlhf/serving/people/questions.py). Both orders
have the same pool. Intervals are 95 % bootstraps that draw people, and seeds of every person. Writes
results/questions.json, under the name of the entry.

FILE is population/new_users.jsonl of a run, or records of your own with `user_id` and, for those to test on,
`held_out`.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from pjrlhf.data import synthetic
from pjrlhf.data.messages import text_of
from pjrlhf.data.schema import Example, validate
from pjrlhf.data.sources import open_source
from pjrlhf.serving.opening import open_folders, open_run
from pjrlhf.serving.people.members import Members, open_members
from pjrlhf.serving.people.questions import expected_information

COUNTS = (0, 1, 2, 4, 8)
RESULTS = pathlib.Path(__file__).parent / "results" / "questions.json"


def read(path: str) -> dict[str, dict[bool, list[Example]]]:
    """Person -> whether held out -> comparisons."""
    examples, _ = validate(open_source({"kind": "jsonl", "path": path}, "--people"), "preference")
    found: dict[str, dict[bool, list[Example]]] = {}
    for example in examples:
        sides = found.setdefault(str(example.user_id), {False: [], True: []})
        sides[bool(example.extra.get("held_out"))].append(example)
    return found


def simulated(path: str, personas: list[str], each: int = 2) -> dict[str, dict[bool, list[Example]]]:
    """People of the synthetic environment, who choose among the pairs of a file; a fifth of the prompts is held out."""
    examples, _ = validate(open_source({"kind": "jsonl", "path": path}, "--people"), "preference")
    prompts = sorted({text_of(example.prompt) for example in examples})
    held = set(np.random.default_rng(0).permutation(prompts)[: len(prompts) // 5].tolist())
    found: dict[str, dict[bool, list[Example]]] = {}
    for number, persona in enumerate(personas * each):
        sides: dict[bool, list[Example]] = {False: [], True: []}
        for i in np.random.default_rng(number).permutation(len(examples)):
            pair = [text_of(answer or "") for answer in (examples[i].chosen, examples[i].rejected)]
            one, other = (synthetic.score(examples[i].prompt, text, persona) for text in pair)
            if one != other:
                chosen, rejected = pair if one > other else pair[::-1]
                example = dataclasses.replace(examples[i], chosen=chosen, rejected=rejected)
                sides[text_of(example.prompt) in held].append(example)
        found[f"{persona} {number}"] = sides
    return found


def curve(members: Members, pool: list[Example], held: list[Example], seed: int | None) -> list[float]:
    """Accuracy after each of `COUNTS`; in random order with a `seed`, by information without."""
    fitter, start, asked = members.fitter, members.table.generic_row, []
    assert fitter is not None
    rest = list(range(len(pool)))
    order = None if seed is None else np.random.default_rng(seed).permutation(len(pool)).tolist()
    found = []
    for k in range(max(COUNTS) + 1):
        row = start
        if k in COUNTS or order is None:
            row = fitter.fit(start, [pool[i] for i in asked])
        if k in COUNTS:
            found.append(float((fitter.margins(row, held)[0] > 0).mean()))
        if order is not None:
            chosen = order[k]
        else:
            new, seen = (fitter.margins(row, [pool[i] for i in some]) for some in (rest, asked))
            chosen = rest[int(np.argmax(expected_information(*new, *seen, members.table.variance)[0]))]
        asked.append(chosen)
        rest.remove(chosen)
    return found


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over people and seeds [U, S] with its bootstrap interval."""
    rng, (U, S) = np.random.default_rng(0), values.shape
    people, seeds = rng.integers(U, size=(2000, U, 1)), rng.integers(S, size=(2000, U, S))
    low, high = np.quantile(values[people, seeds].mean((1, 2)), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run directory")
    parser.add_argument("--entry", help="of the run")
    parser.add_argument("--model", help="in place of --run")
    parser.add_argument("--ingredients", nargs="+", default=[], metavar="NAME=FOLDER", help="of --model")
    parser.add_argument("--people", required=True)
    parser.add_argument("--personas", help="of the synthetic environment, who choose among the pairs of FILE: P1A,P2B")
    parser.add_argument("--pool", type=int, default=16, help="comparisons to choose from")
    parser.add_argument("--held", type=int, default=16, help="comparisons to test on, at most")
    parser.add_argument("--seeds", type=int, default=2, help="pools, and random orders of each")
    parser.add_argument("--output", default=str(RESULTS))
    given = parser.parse_args()
    if given.model:
        opened = open_folders(given.model, dict(one.split("=", 1) for one in given.ingredients))
    else:
        opened = open_run(given.run, given.entry)
    members = open_members(opened, "sqlite://").people
    assert isinstance(members, Members)
    curves: dict[str, list[list[list[float]]]] = {"random": [], "information": []}
    people = simulated(given.people, given.personas.split(",")) if given.personas else read(given.people)
    for name, sides in people.items():
        if len(sides[False]) < given.pool or not sides[True]:
            continue
        one: dict[str, list[list[float]]] = {order: [] for order in curves}
        for seed in range(given.seeds):
            some = np.random.default_rng(seed).permutation(len(sides[False]))[: given.pool]
            pool, held = [sides[False][i] for i in some], sides[True][: given.held]
            one["random"].append(curve(members, pool, held, seed))
            one["information"].append(curve(members, pool, held, None))
        for order in curves:
            curves[order].append(one[order])
        print(name, *(f"{order} {np.mean(one[order], 0).round(3).tolist()}" for order in curves), flush=True)
    found = {order: np.moveaxis(np.array(each), -1, 0) for order, each in curves.items()}  # [counts, U, S]
    found["gain"] = found["information"] - found["random"]
    rows = {order: [interval(x) for x in each] for order, each in found.items()}
    output = pathlib.Path(given.output)
    results = json.loads(output.read_text()) if output.is_file() else {}
    note = {"people": len(curves["random"]), "seeds": given.seeds, "pool": given.pool}
    results[given.entry or "soups"] = {**note, "comparisons": COUNTS, **rows}
    output.write_text(json.dumps(results, indent=1) + "\n")
    print("| comparisons | random order | most informative first | difference |\n|---|---|---|---|")
    for i, k in enumerate(COUNTS):
        cells = (
            f"{rows[name][i]['mean']:.3f} ({rows[name][i]['low']:.3f} to {rows[name][i]['high']:.3f})"
            for name in ("random", "information", "gain")
        )
        print(f"| {k} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
