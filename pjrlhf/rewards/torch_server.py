"""The process that runs a classifier of `transformers` in torch, see `torch_worker`. It imports nothing of pjrlhf.

    python -m pjrlhf.rewards.torch_server FOLDER DTYPE DEVICE

Reads a JSON line {"rows": [{"input_ids": [...], ...}, ...]} and writes {"logits": [[...], ...]}; first of all it writes
{"ready": true}. {"error": "..."} stands in place of either. It ends when its input does.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, list[int]]]


def main(folder: str, dtype: str, device: str) -> None:
    """Serves requests until the input ends."""
    # What libraries print must not stand among the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(make: Callable[[], dict[str, Any]]) -> bool:
        try:
            found = make()
        except Exception as error:
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        replies.write(json.dumps(found) + "\n")
        replies.flush()
        return "error" not in found

    loaded: list[Callable[[Rows], list[list[float]]]] = []

    def load() -> dict[str, Any]:
        loaded.append(load_model(folder, dtype, device))
        return {"ready": True}

    if not reply(load):
        return
    for line in sys.stdin:
        reply(lambda line=line: {"logits": loaded[0](json.loads(line)["rows"])})


def load_model(folder: str, dtype: str, device: str) -> Callable[[Rows], list[list[float]]]:
    """The logits of rows by the model in a folder.

    Raises:
      ValueError: the weights lack a tensor or have one of another shape, which `transformers` would make up.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
    )
    wrong = {"lack": info["missing_keys"], "have another shape of": [key for key, *_ in info["mismatched_keys"]]}
    for complaint, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights {complaint} {min(names)}{more}")
    model = model.to(device).eval()
    pad_id = model.config.get_text_config().pad_token_id
    # Without a padding token some models refuse batches, and a summary of the last token would be one of padding.
    alone = pad_id is None or hasattr(model, "sequence_summary")
    known = set(inspect.signature(model.forward).parameters)

    def batch(rows: Rows) -> list[list[float]]:
        length = max(len(row["input_ids"]) for row in rows)
        arrays = {"attention_mask": [[1] * len(row["input_ids"]) for row in rows]}
        arrays |= {name: [row[name] for row in rows] for name in rows[0] if name in known}
        fill = {"input_ids": pad_id or 0}
        padded = {
            name: torch.tensor([row + [fill.get(name, 0)] * (length - len(row)) for row in values], device=device)
            for name, values in arrays.items()
        }
        with torch.inference_mode():
            return model(**padded).logits.float().cpu().tolist()

    def logits(rows: Rows) -> list[list[float]]:
        return [batch([row])[0] for row in rows] if alone else batch(rows)

    return logits


if __name__ == "__main__":
    main(*sys.argv[1:])
