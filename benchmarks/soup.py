"""Merging full models against mergekit and against memory itself:  python benchmarks/soup.py [--counts 3 8]

A round is one linear merge of k float32 models with equal weights. From folder to folder: ours is `export.merge.merge`,
mergekit its library in the same process (`run_merge`), and both once more as commands, which start anew every time. In
memory: ours is `merging.trees.weighted_sum`, into the soup before it or into new memory, torch a loop of `add_`. The
floor in memory is a plain copy that moves as many bytes, k reads and one write: a copy of (k + 1) / 2 models, by one
thread. The floor of folders reads the k files, writes one, and computes nothing. Files are read from the page cache.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import harness


def _fresh(job, name):
    output = pathlib.Path(job["folder"]) / name
    shutil.rmtree(output, ignore_errors=True)
    return output


def _report(output):
    """A number that says whether two merges gave the same."""
    from safetensors import safe_open

    name = "model.layers.1.mlp.up_proj.weight"
    for path in output.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            if name in file.keys():  # noqa: SIM118  (no mapping)
                return {"checksum": float(abs(file.get_tensor(name)).sum())}
    raise FileNotFoundError(f"{output}: holds no {name}")


def _paced(turn, ready, merge, output):
    """`merge()` writes `output`; reading it back is no part of the round."""
    turn(ready)
    report = {}
    while True:
        merge()
        seconds = turn.seconds()
        if not report:
            report = _report(output)
        turn({**report, "seconds": seconds})


def ours(job, turn):
    from pjrlhf.export.merge import MergeSettings, merge

    harness.load_ours()
    turn.begin()
    output, k = _fresh(job, "ours"), len(job["models"])

    def run():
        weights, target = (1 / k,) * k, str(_fresh(job, "ours"))
        merge(MergeSettings(ingredients=tuple(job["models"]), weights=weights, output=target))

    _paced(turn, {"versions": harness.our_versions()}, run, output)


def _recipe(job):
    k = len(job["models"])
    models = [{"model": model, "parameters": {"weight": 1 / k}} for model in job["models"]]
    return {"merge_method": "linear", "dtype": "float32", "models": models, "parameters": {"normalize": False}}


def mergekit(job, turn):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    turn.begin()
    recipe = MergeConfiguration.model_validate(_recipe(job))
    options = MergeOptions(**job["options"], quiet=True)

    def run():
        run_merge(recipe, str(_fresh(job, "mergekit")), options)

    _paced(turn, {"versions": harness.their_versions("mergekit")}, run, pathlib.Path(job["folder"]) / "mergekit")


def command(job, turn):
    """Either as a command, whose memory is that of its process as a whole."""
    turn.begin()
    turn.memory_peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    output, k = f"{job['folder']}/command-{job['who']}", len(job["models"])
    if job["who"] == "mergekit":
        recipe = pathlib.Path(job["folder"]) / "recipe.yaml"
        recipe.write_text(json.dumps(_recipe(job)))  # JSON is YAML
        script = pathlib.Path(sys.executable).with_name("mergekit-yaml")
        line = [sys.executable, str(script), str(recipe), output, "--lazy-unpickle", "--quiet"]
        line += [] if job["options"]["copy_tokenizer"] else ["--no-copy-tokenizer"]
    else:
        config = harness.FOLDER.parent / "configs" / "merge.py"
        line = [sys.executable, "-m", "pjrlhf.main", f"--config={config}", f"--workdir={job['folder']}/work"]
        line += [f"--config.merge.ingredients={tuple(job['models'])}", f"--config.merge.weights={(1 / k,) * k}"]
        line += [f"--config.merge.output={output}"]

    def run():
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(f"{job['folder']}/work", ignore_errors=True)
        subprocess.run(line, check=True, stdout=sys.stderr, env=os.environ)

    _paced(turn, {}, run, pathlib.Path(output))


def our_arrays(job, turn):
    import jax

    from pjrlhf.merging.trees import weighted_sum
    from pjrlhf.models.huggingface import load_params

    harness.load_ours()
    turn.begin()
    k = len(job["models"])
    models = [load_params(folder) for folder in job["models"]]
    soup = jax.block_until_ready(weighted_sum(models, [1 / k] * k))
    turn({"versions": harness.our_versions()})
    while True:
        # As for one person after the other.
        soup = jax.block_until_ready(weighted_sum(models, [1 / k] * k, soup if job["again"] else None))
        turn({})


def torch_arrays(job, turn):
    import torch
    from safetensors.torch import load_file

    turn.begin()
    k = len(job["models"])
    models = [load_file(f"{folder}/model.safetensors") for folder in job["models"]]
    turn({"versions": harness.their_versions()})
    with torch.inference_mode():
        while True:
            soup = {name: x * (1 / k) for name, x in models[0].items()}
            for model in models[1:]:
                for name, x in model.items():
                    soup[name].add_(x, alpha=1 / k)
            turn({})


def copy(job, turn):
    import numpy as np

    turn.begin()
    k, size = len(job["models"]), job["bytes"] // 4
    source, target = np.ones(size, np.float32), np.ones(size, np.float32)
    turn({})
    while True:
        left = size * (k + 1) // 2
        while left > 0:
            part = min(left, size)
            np.copyto(target[:part], source[:part])
            left -= part
        turn({})


def files(job, turn):
    turn.begin()
    paths, target = [f"{folder}/model.safetensors" for folder in job["models"]], f"{job['folder']}/files"
    piece, size = bytearray(2**20), job["bytes"]
    turn({})
    while True:
        pathlib.Path(target).unlink(missing_ok=True)
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(piece):
                    pass
        with open(target, "wb", buffering=0) as file:
            for start in range(0, size, len(piece)):
                file.write(memoryview(piece)[: size - start])
        turn({})


def compare(options):
    size = "tiny" if options.quick else options.model[0]
    tables, about = {}, {}
    with harness.Comparison(__file__, options) as c:
        models = []
        for seed in range(max(options.counts)):
            shape = harness.save_model(c.folder / f"model{seed}", size, 256, seed)
            models.append(str(c.folder / f"model{seed}"))
        for k in options.counts:
            bytes_ = 4 * shape["parameters"]
            job = {"models": models[:k], "bytes": bytes_, "options": {"lazy_unpickle": True, "copy_tokenizer": True}}
            job["options"]["write_model_card"] = False
            folders = {
                "ours": c.ours("ours", **job),
                "mergekit": c.theirs("mergekit", **job),
                "ours, command": c.ours("command", **job, who="ours"),
                "mergekit, command": c.theirs("command", **job, who="mergekit"),
                "files alone": c.ours("files", **job),
                "copy": c.ours("copy", **job),
            }
            arrays = {
                "ours": c.ours("our_arrays", **job, again=True),
                "ours, memory anew": c.ours("our_arrays", **job, again=False),
                "torch": c.theirs("torch_arrays", **job),
                "copy": c.ours("copy", **job),
            }
            for title, sides in (("folders", folders), ("memory", arrays)):
                for name, side in sides.items():
                    if name == "ours" or not options.sides or name in options.sides:
                        c.start(name, side)
                c.run(options.rounds, 1)
                found = c.found("ours")
                for row in found.values():
                    row["gib_per_second"] = (k + 1) * bytes_ / row["seconds"]["median"] / 2**30
                for name in list(c.sides):
                    c.stop(name)
                name = f"{k} models, {title}"
                tables[name], about[name] = found, {"models": k, "bytes": bytes_}
                harness.table(
                    f"{name}: {bytes_ / 2**30:.3f} GiB each", found, {"gib_per_second": "GiB/s", "checksum": "checksum"}
                )
    return tables, about


def main():
    parser = harness.arguments(__doc__, rounds=5, models=("134m",))
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 8], help="of models")
    options = harness.parse(parser)
    tables, about = compare(options)
    harness.bars(harness.write(options, "soup", {"merges": about}, tables), tables, "ours")


if __name__ == "__main__":
    sides = {"ours": ours, "mergekit": mergekit, "command": command}
    harness.serve(sides | {"our_arrays": our_arrays, "torch_arrays": torch_arrays, "copy": copy, "files": files})
    main()
