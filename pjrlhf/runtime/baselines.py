"""Answers of the base with which rewards compare others, kept in the run directory so that they stay the same."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from pjrlhf.data.messages import Prompt, columns_of
from pjrlhf.errors import UserError
from pjrlhf.parallel.processes import is_process_zero, json_from_zero
from pjrlhf.paths import disk_errors
from pjrlhf.training.workdir import end_line, read_lines
from pjrlhf.types import Json

FILE = "baselines.jsonl"


class BaseAnswers:
    """One answer of the base to each request. What was answered once, also before a restart, is not sampled again.

    Args:
      folder: where the answers are kept, the run directory.
      base: fingerprint of the base.
      sample: (requests, "greedy" or "sampled", number of the call) -> one answer to each; all processes must call it.
    """

    def __init__(self, folder: pathlib.Path, base: str, sample: Callable[[Sequence[Prompt], str, int], Sequence[str]]):
        self.path, self.base, self.sample = folder / FILE, base, sample
        lines = json_from_zero(lambda: _lines(self.path))
        self._known = {(one["how"], one["key"]): one["answer"] for one in lines if one["base"] == base}

    def __call__(self, prompts: Sequence[Prompt], how: str) -> list[str]:
        """The answers to N prompts. All processes must call it.

        Args:
          how: "greedy" or "sampled".
        """
        keys = [_key(prompt) for prompt in prompts]
        waiting = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if (how, key) not in self._known}
        if waiting:
            # The number of those before it, so that each call draws anew, and alike after a restart.
            answers = self.sample(list(waiting.values()), how, len(self._known))
            self._known |= {(how, key): text for key, text in zip(waiting, answers, strict=True)}
            if is_process_zero():
                self._keep(how, waiting, answers)
        return [self._known[how, key] for key in keys]

    def _keep(self, how: str, prompts: Mapping[str, Prompt], answers: Sequence[str]) -> None:
        with disk_errors(self.path):
            end_line(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                for (key, prompt), text in zip(prompts.items(), answers, strict=True):
                    line = {"how": how, "prompt": prompt, **columns_of(prompt), "answer": text}
                    file.write(json.dumps({**line, "base": self.base, "key": key}) + "\n")


def _lines(path: pathlib.Path) -> list[Json]:
    """The answers in a file."""
    try:
        lines = read_lines(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend it, or choose another --workdir") from error
    return [line for line in lines if all(isinstance(line.get(name), str) for name in ("how", "key", "base", "answer"))]


def _key(prompt: Prompt) -> str:
    text = json.dumps([prompt, columns_of(prompt)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
