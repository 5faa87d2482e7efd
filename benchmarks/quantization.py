"""What a quantised base costs in quality:  python benchmarks/quantization.py --model FOLDER --records FILE

The base in every form of `model.quantize` scores the same answers. Per form: bytes of the layers and of the whole base,
perplexity of the answers given their prompts, and how much the mean log-prob of an answer's tokens falls against
floats, in nats with a 95 % interval over answers. Writes results/quantization.json.
"""

import argparse
import gzip
import json
import pathlib
from typing import Any

import jax
import numpy as np

from pjrlhf.data.messages import as_turns
from pjrlhf.language_model import LanguageModel, load_model
from pjrlhf.models.quantization import QUANTIZATIONS

RESULT = pathlib.Path(__file__).with_name("results") / "quantization.json"
ROWS = 10  # scored at once


def read(path: str, model: LanguageModel, count: int, longest: int) -> tuple[list[Any], list[str], np.ndarray]:
    """Prompts, answers and the numbers of their tokens: the first `count` JSON lines with fields prompt and response
    that have at most `longest` tokens, the shortest first.
    """
    found: list[tuple[int, Any, str, int]] = []
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        for line in file:
            record = json.loads(line)
            prompt = as_turns(record["prompt"]) if model.tokenizer.has_chat_template else record["prompt"]
            ids, (answer,) = model.tokenizer.encode_answers(prompt, [record["response"]])
            if len(ids) + len(answer.ids) <= longest:
                found.append((len(ids) + len(answer.ids), prompt, record["response"], len(answer.ids)))
            if len(found) == count:
                break
    found.sort(key=lambda one: one[0])
    _, prompts, answers, lengths = zip(*found, strict=True)
    return list(prompts), list(answers), np.array(lengths)


def held(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="its folder")
    parser.add_argument("--records", required=True, help="JSON lines, perhaps gzipped")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--longest", type=int, default=384, help="tokens of a prompt with its answer")
    options = parser.parse_args()
    floats, rows = None, []
    for kind in ("", *QUANTIZATIONS):
        model = load_model(options.model, quantize=kind)
        prompts, answers, lengths = read(options.records, model, options.count, options.longest)
        parts = [slice(start, start + ROWS) for start in range(0, len(answers), ROWS)]
        sums = np.concatenate([model.score(prompts[part], answers[part]) for part in parts])
        floats = sums if floats is None else floats
        falls = (floats - sums) / lengths
        base = model.backbone.base
        row = {
            "quantize": kind,
            "layers_mib": held(base["layers"]) / 2**20,
            "base_mib": held(base) / 2**20,
            "perplexity": float(np.exp(-sums.sum() / lengths.sum())),
            "fall": float(falls.mean()),
            "interval": 1.96 * float(falls.std(ddof=1)) / len(falls) ** 0.5,
        }
        rows.append(row)
        print(row, flush=True)
    about = {"answers": len(answers), "tokens": int(lengths.sum()), "longest": options.longest}
    RESULT.write_text(json.dumps({**about, "forms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
