"""Classifiers of `transformers` that our decoder does not compute, in torch, in a process of their own."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pjrlhf.errors import UserError
from pjrlhf.paths import install
from pjrlhf.rewards.inputs import Row
from pjrlhf.training.progress import progress
from pjrlhf.types import Json


def check_torch(folder: pathlib.Path, architecture: str) -> None:
    """Raises UserError where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"classifier {folder}: {architecture} runs in torch, which is not installed; {install('torch')}, the extra "
            "torch"
        )


class TorchWorker:
    """The process of one classifier. It starts at the first call, and ends with `close`, with this object, or with this
    process.

    Args:
      folder: in Hugging Face layout, with safetensors weights.
      dtype: name of a float type of torch.
      device: of torch.
      size: rows of a batch.
      title: of the progress.
    """

    def __init__(self, folder: pathlib.Path, dtype: str, device: str, size: int, title: str):
        self.folder, self.dtype, self.device, self.size, self.title = folder, dtype, device, size, title
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, rows: Sequence[Row]) -> Float[np.ndarray, "N labels"]:
        """Float32 logits of N rows, in their order. Rows of similar length share a batch.

        Raises:
          UserError: the model cannot be loaded, or fails; the message names it.
        """
        order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
        found: list[Any] = [None] * len(rows)
        with self._lock, progress(self.title, len(rows)) as bar:
            for start in range(0, len(rows), self.size):
                chunk = order[start : start + self.size]
                logits = self._ask({"rows": [rows[i] for i in chunk]})["logits"]
                for i, values in zip(chunk, logits, strict=True):
                    found[i] = values
                bar.update(start + len(chunk), {})
        return np.array(found, np.float32)

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._end()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "pjrlhf.rewards.torch_server", str(self.folder), self.dtype, self.device]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        self._reply(process)
        return process

    def _ask(self, request: Json) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin, process  # a pipe
        with contextlib.suppress(OSError):  # the process has ended, which its missing reply says
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self._reply(process)

    def _reply(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout, process  # a pipe
        line = process.stdout.readline()
        if not line.endswith("\n"):
            status = process.wait()
            self._errors.seek(0)
            said = [text for text in self._errors.read().splitlines() if text.strip()]
            self.close()
            raise UserError(
                f"classifier {self.folder}: its torch process ended with status {status} "
                f"({' '.join(said[-1:])[:200] or 'without a word'}); it may need more memory: lower its batch_size or "
                "max_length"
            )
        reply = json.loads(line)
        if "error" in reply:
            self.close()
            raise UserError(
                f"classifier {self.folder}: fails in torch ({reply['error']}); restore the folder, or correct the "
                "settings of this reward"
            )
        return reply


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process without waiting for a reply under way."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()
