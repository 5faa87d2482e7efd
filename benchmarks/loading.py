"""How much host memory it takes to read a Hugging Face folder into shards:  python benchmarks/loading.py [--gib 1]

Writes a model of about that size, and reads it in a fresh process, whole onto one device and split over eight. On a CPU
the devices' memory is the host's, so what reading takes besides is the peak minus what stays. Pages of the mapped file
are left out: they are the system's, which takes them back when it needs them. A host array may become the device's as
it lies; where devices have memory of their own, the part of a leaf that is being read comes on top. Writes
results/loading.json; compare with the largest leaf (a matrix of all layers), its part on each of eight devices, and the
largest tensor of the file.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

RESULT = pathlib.Path(__file__).with_name("results") / "loading.json"
READ = """
import functools, json, sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from pjrlhf.models.huggingface import load_params
from pjrlhf.parallel.mesh import leaf_sharding, make_mesh

def now():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], now())
        time.sleep(0.0005)

mesh = make_mesh({"fsdp": -1})
done, before = threading.Event(), now()
peak, watcher, started = [before], threading.Thread(target=watch), time.perf_counter()
watcher.start()
params = jax.block_until_ready(load_params(sys.argv[1], place=functools.partial(leaf_sharding, mesh)))
seconds, after = time.perf_counter() - started, now()
done.set()
watcher.join()
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"params": size, "besides": peak[0] - max(after, before + size), "seconds": round(seconds, 1)}))
"""


def write(folder: pathlib.Path, gib: float) -> dict[str, float]:
    """A folder with a model of about that size; bytes of its largest leaf and tensor."""
    import numpy as np

    from pjrlhf.models.config import ModelConfig
    from pjrlhf.models.families import leaf_shapes
    from pjrlhf.models.huggingface import save_params

    width = 256 * max(1, round(math.sqrt(gib * 2**30 / 4 / (12 * 16)) / 256))
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_layers=16,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
    )
    shapes = leaf_shapes(config)
    params: dict = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = np.zeros(shape, np.float32)
    save_params(folder, config, params)
    leaves = [4 * math.prod(shape) for shape in shapes.values()]
    tensors = [4 * math.prod(s[1:] if path.startswith("layers") else s) for path, s in shapes.items()]
    del params
    return {"largest_leaf": max(leaves), "largest_part_of_8": max(leaves) // 8, "largest_tensor": max(tensors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        found = write(model, options.gib)
        for devices in (1, 8):
            command = [sys.executable, "-c", READ, str(model), str(devices)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{devices} devices"] = json.loads(done.stdout.splitlines()[-1])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
