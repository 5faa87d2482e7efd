"""The reference's log-probs, or rewards of S reward models, in packed rows against padded ones:
python benchmarks/scoring.py [--rewards 3]

A round scores both answers of every pair once. "ours" is what runs do: a prompt is read once for its answers, and rows
are filled. "padded" has one answer in a row, rows of similar length together, padded to the smallest of a few lengths.
Both compute the same numbers, which are compared.
"""

import functools
import itertools

import harness
import pairs

PACKED = "ours"
BUCKETS = [(32, 64, 128), (32, 64, 128, 256)]  # lengths of prompts and answers below the greatest


def scored(job, turn, packed):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pjrlhf.algorithms import modpo
    from pjrlhf.models.adapters import init_bank
    from pjrlhf.rollout import scoring
    from pjrlhf.rollout.experience import raw_rewards
    from pjrlhf.rollout.reference import summed_logps, unique_answers

    harness.load_ours()
    turn.begin()
    harness.watch_jax(turn, job)
    changes = {"adapter": {"rank": 8, "alpha": 16.0}, **pairs.length_settings(job)}
    run = harness.our_run(job, "pdpo", "records", changes)
    backbone, S = run.workspace.backbone, job["rewards"]
    examples, name = run.records.comparisons({"kind": "jsonl", "path": job["records"]}, "data")
    answers, _ = unique_answers(run.text.tokenized(examples, run.text.lengths, name))
    size, arguments = 2 * job["at_once"], (backbone,)
    if S:
        heads = scoring.init_heads(S, backbone.model.config.hidden_size, jax.random.key(1))
        arguments = backbone, {"bank": init_bank(backbone.base, backbone.adapter, S, jax.random.key(2)), "heads": heads}
    if packed:
        score = functools.partial(jax.jit(modpo.scores if S else summed_logps), *arguments)
        scores = functools.partial(run.answer_scores, "scores", answers, score, rows=size)
    else:

        @jax.jit
        def of_rows(batch, backbone, rewarder=None):
            if rewarder:
                return raw_rewards(backbone, rewarder, jnp.arange(S)[None], batch.tokens, batch.valid)
            return scoring.sequence_logps(backbone.policies(), batch.tokens, batch.valid, batch.prompt_length)[0]

        lengths = [len(row["prompt"]) + len(row["completion"]) for row in answers]

        def scores():
            from pjrlhf.runtime.scorer import Scorer

            scorer = Scorer(run.devices, size)
            return scorer("scores", answers, run.text.pad_completions, lambda x: of_rows(x, *arguments), lengths)

    turn({"peak": harness.gemm_peak("jax"), "versions": harness.our_versions()})
    for _ in itertools.count():
        turn({"mean": float(np.mean(scores()))})


def ours(job, turn):
    scored(job, turn, packed=True)


def padded(job, turn):
    scored(job, turn, packed=False)


def compare(options, size):
    with harness.Comparison(__file__, options) as c:
        work = pairs.Pairs(c, options, size)
        work.used = work.records
        job = {**work.job, "batches": 1, "rewards": options.rewards, "at_once": options.at_once}
        job["buckets"] = [(), ()] if options.quick else BUCKETS
        for name, kind in {PACKED: "ours", "padded": "padded"}.items():
            if name == PACKED or not options.sides or name in options.sides:
                c.start(name, c.ours(kind, **job))
        work.job["batches"] = 1
        found, about = work.run(PACKED, scored=lambda answer: 0 if options.rewards else answer)
    return found, {**about, "answers": 2 * len(work.used), "rewards": options.rewards}


def main():
    parser = pairs.arguments(__doc__)
    parser.add_argument("--rewards", type=int, default=0, help="reward models; 0 is the reference")
    parser.add_argument("--at_once", type=int, default=8, help="pairs that are scored at once")
    options = harness.parse(parser)
    columns = {"tokens_per_second": "tokens/s", "mean": "mean score"}
    name = "scoring_rewards" if options.rewards else "scoring"
    harness.report(options, name, compare, PACKED, lambda about: f"{about['answers']} answers a round", columns)


if __name__ == "__main__":
    harness.serve({"ours": ours, "padded": padded})
    main()
