"""What the comparisons of steps on pairs share: the pairs, in one order for all sides, and how much work they are."""

import harness

LIMITS = (192, 448)  # tokens of prompt and answer at most


def arguments(description):
    parser = harness.arguments(description)
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--batches", type=int, default=4, help="that are gone through again and again")
    return parser


def length_settings(job):
    """Of our config."""
    prompt, answer = job["limits"]
    return {
        "data.max_prompt": prompt,
        "data.max_completion": answer,
        "data.prompt_buckets": job["buckets"][0],
        "data.completion_buckets": job["buckets"][1],
    }


def dataset(job):
    """The pairs in the order in which our side takes them, for TRL."""
    import datasets

    keep = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([{k: r[k] for k in keep} for r in harness.read_records(job["ordered"])])


class Pairs:
    """The work of a comparison `c` on models of a size.

    Attributes:
      shape: dimensions of the model and its number of parameters.
      job: what every side needs to know.
      used: the records of the batches, in their order, once our side has said it.
    """

    def __init__(self, c, options, size):
        quick = options.quick
        limits, batches = ((24, 40), 2) if quick else (LIMITS, options.batches)
        pairs = 4 if quick else options.pairs
        self.c, self.rounds = c, -(-options.rounds // batches) * batches
        # The Llama of Tunix 0.1.7 rotates with this base, whatever its config says.
        self.shape = harness.save_model(c.folder / "model", size, sum(limits) + 32, rope_theta=1e6)
        self.records = harness.pair_records(pairs * batches + 2, self.shape["vocab_size"], limits)
        self.job = {
            "model": str(c.folder / "model"),
            "records": harness.write_records(c.folder / "pairs.jsonl", self.records),
            "ordered": str(c.folder / "ordered.jsonl"),
            "limits": limits,
            "buckets": [(), ()] if quick else [(64,), (224,)],
            "pairs": pairs,
            "batches": batches,
            "optimizer": {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0},
            "set": options.set,
        }

    def order(self, rows):
        """Writes the records whose numbers our side took, batch by batch, where the others read them."""
        self.used = [self.records[i] for batch in rows for i in batch]
        harness.write_records(self.c.folder / "ordered.jsonl", self.used)

    def run(self, first, scored):
        """Lets the sides take turns; what was found beside the side `first`, and what it was about.

        Args:
          scored: (tokens of an answer) -> how many of them reach the vocabulary.
        """
        batches = self.job["batches"]
        self.c.run(self.rounds, batches)
        found = self.c.found(first)
        peak = max(side.ready["peak"] for side in self.c.sides.values())
        rows = [(len(p), len(a)) for r in self.used for p, *answers in [harness.ids_of(r)] for a in answers]
        tokens = sum(p + a for p, a in rows) / batches
        flops = 3 * sum(harness.matmul_flops(self.shape, p + a, scored(a)) for p, a in rows) / batches
        harness.utilisation(found, flops, tokens, peak)
        about = {name: self.job[name] for name in ("pairs", "limits")} | {"parameters": self.shape["parameters"]}
        return found, {**about, "tokens_per_round": tokens, "flops_per_round": flops, "peak_flops": peak}


def report(options, name, compare, first):
    """Compares models of all sizes asked for, see `harness.report`."""
    harness.report(
        options,
        name,
        compare,
        first,
        lambda about: f"{about['pairs']} pairs a round",
        {"tokens_per_second": "tokens/s", "mfu_percent": "MFU %", "loss": "last loss"},
    )
