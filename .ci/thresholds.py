"""Whether the main job learned: bounds on the figures of its summary.json, with room below docs/results/soups.md.

python .ci/thresholds.py RUN/report/summary.json
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any


def figures(summary: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(what, value, the least it may be); all but Spearman's are fractions."""

    def rate(one: dict[str, Any]) -> float:
        return one["wins"] / max(one["wins"] + one["losses"], 1)

    for method, opponent, least in (
        ("soups", "base", 0.75),
        ("soups", "prompting", 0.58),
        ("soups", "rlhf", 0.72),
        ("prompting", "base", 0.55),
        ("pmorl", "base", 0.80),
        ("pmorl", "prompting", 0.70),
        ("pmorl", "soups", 0.50),
    ):
        yield f"{method} against {opponent}", rate(summary["win_rate"][method][opponent]), least
    (unprompted,) = summary["ablation"].values()
    yield "unprompted soups against base", rate(unprompted["base"]), 0.68
    for name, one in summary["ingredients"].items():
        yield f"policy {name} against base", rate(one["win_rate_vs_base"]), 0.5 if name == "helpful" else 0.7
    for name, one in summary["reward_models"].items():
        yield f"held-out accuracy of reward {name}", one["accuracy"], 0.8 if name == "helpful" else 0.88
    correlations = [
        (f"Spearman, {sweep}, {name}", value, 0.75)
        for sweep, found in summary["sweep"].items()
        for name, value in found["spearman"].items()
    ]
    yield from correlations
    yield "Spearman, mean", sum(value for _, value, _ in correlations) / len(correlations), 0.9


def main(path: str) -> int:
    summary = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    failed = 0
    for what, value, least in figures(summary):
        right = value is not None and value >= least
        failed += not right
        print(f"{'    ' if right else 'LOW '}{what:<45} {value:6.3f}  at least {least:.2f}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
