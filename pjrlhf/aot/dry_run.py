"""A run of shapes: the stages of a run on devices that are not here, where a program that is called is compiled and
measured.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from pjrlhf.algorithms import modpo, reward
from pjrlhf.algorithms.modpo import Modpo
from pjrlhf.data import synthetic
from pjrlhf.data.comparisons import SIDES
from pjrlhf.data.messages import Answer, Prompt, Request
from pjrlhf.data.packing import PackedRows
from pjrlhf.data.schema import Example
from pjrlhf.data.token_table import TokenTable
from pjrlhf.data.tokenization import AnswerIds, Tokenizer
from pjrlhf.errors import UserError
from pjrlhf.feedback.pairs import Pairs, PairSettings, registry_of, tables_of
from pjrlhf.models.adapters import frozen_factors
from pjrlhf.models.config import ModelConfig
from pjrlhf.models.families import leaf_shapes
from pjrlhf.models.hub import config_folder
from pjrlhf.models.huggingface import read_config
from pjrlhf.models.quantization import get_quantization, quantize_params
from pjrlhf.models.shared_a import with_a
from pjrlhf.parallel.mesh import batch_sharding, make_mesh, shardings
from pjrlhf.parallel.roofline import CHIPS, Cost, Estimate, collective_bytes, estimate, matmul_cost, memory_bytes
from pjrlhf.paths import install
from pjrlhf.pipeline.stages import read
from pjrlhf.rollout import reference
from pjrlhf.rollout.batches import Prompts
from pjrlhf.runtime.audience import Audience
from pjrlhf.runtime.devices import Devices, MeshSettings
from pjrlhf.runtime.packed_answers import PackedAnswers
from pjrlhf.runtime.records import CorpusSettings, DataSettings, Records, SourceSpec
from pjrlhf.runtime.run import Run, SharedSettings
from pjrlhf.runtime.streams import Streams
from pjrlhf.runtime.workspace import Workspace
from pjrlhf.training.progress import progress
from pjrlhf.training.workdir import Workdir
from pjrlhf.types import Array, Params, PRNGKey, Tree

FIRST_ID = 5  # of the ids that stand for text; lower ones are special


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled program.

    Attributes:
      memory: bytes on each chip at the peak, and `limit`, its HBM.
      cost: of the matrix products, on all chips, rematerialised ones included.
      sent: bytes that each chip sends, by kind of collective.
      problem: why it could not be compiled, if so: it needs more memory than there is.
    """

    name: str
    memory: int
    limit: int
    cost: Cost
    sent: Mapping[str, float]
    estimate: Estimate
    seconds: float
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem and self.memory <= self.limit


class _Tokenizer(Tokenizer):
    """A tokenizer for a run without text: every prompt and answer is as long as it may be."""

    def __init__(self, prompt: int, completion: int, vocab_size: int):
        self.prompt, self.completion = prompt, completion
        self.vocab_size = self.rows = vocab_size
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.add_bos = 1, 2, 0, None, True
        self.eos_ids = (2,)
        self.has_chat_template = False

    def encode_prompt(self, prompt: Prompt, start: str = "") -> list[int]:
        return [FIRST_ID] * self.prompt

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return ""

    def encode_answers(self, prompt: Prompt, answers: Sequence[Answer]) -> tuple[list[int], list[AnswerIds]]:
        found = [[FIRST_ID + i] * self.completion for i in range(len(answers))]
        return self.encode_prompt(prompt), [AnswerIds(ids, [True] * len(ids)) for ids in found]


class DryDevices(Devices):
    """Devices that are not here: arrays are shapes, and a program that is called is compiled and measured.

    Attributes:
      steps: what was compiled so far.
      naming: what the programs to come are called.
      resident: bytes on each chip that lie there beside the arguments of a program.
    """

    def __init__(self, settings: MeshSettings, trip_count: int, topology: str):
        self.chip, self.devices = devices_of(topology)
        super().__init__(settings, trip_count)
        self.steps: list[Step] = []
        self.naming, self.resident = "step", 0
        self._measured: dict[str, _Measured] = {}  # by the text of the program: entries may share theirs

    def make_mesh(self, settings: MeshSettings) -> jax.sharding.Mesh:
        return make_mesh(settings.to_dict(), self.devices)

    def create(self, make: Callable[..., Any], *arguments: Tree, donate: tuple[int, ...] = ()) -> Tree:
        return self.shard(jax.eval_shape(make, *arguments))

    def shard(self, tree: Tree) -> Tree:
        """The shapes of parameters, sharded by the partition rules."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings(self.mesh, tree)
        )

    def place(self, batch: Tree) -> Tree:
        def one(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self.mesh, x.shape[0]))

        return jax.tree.map(one, batch)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Programs compiled inside are those of this part of the plan."""
        whole, self.naming = self.naming, f"{self.naming}: {name}"
        yield
        self.naming = whole

    @contextlib.contextmanager
    def beside(self, more: int) -> Iterator[None]:
        """So many more bytes on each chip lie beside the programs compiled inside."""
        self.resident += more
        yield
        self.resident -= more

    def program(self, step: Callable[..., Any], **options: Any) -> Any:
        jitted = jax.jit(step, **options)

        def compiled(*arguments: Any, **keywords: Any) -> Any:
            traced = jitted.trace(*arguments, **keywords)
            self.steps.append(self._compiled(traced))
            return traced.out_info

        return compiled

    def _compiled(self, traced: jax.stages.Traced) -> Step:
        limit, started = int(CHIPS[self.chip].memory), time.perf_counter()
        cost = matmul_cost(traced.jaxpr.jaxpr, self.trip_count)
        with progress(f"compiling {self.naming}", 1):
            lowered = traced.lower()
            text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            if text not in self._measured:
                self._measured[text] = _compile(lowered, limit)
        found = self._measured[text]
        least = estimate(CHIPS[self.chip], len(self.devices), cost, sum(found.sent.values()))
        seconds = time.perf_counter() - started
        logging.info("%s: compiled in %.0f s", self.naming, seconds)
        return Step(self.naming, found.memory + self.resident, limit, cost, found.sent, least, seconds, found.problem)


class _Measured(NamedTuple):
    """What compiling a program tells, as in `Step`."""

    memory: int
    sent: Mapping[str, float]
    problem: str = ""


def _compile(lowered: jax.stages.Lowered, limit: int) -> _Measured:
    """Compiles for a chip with `limit` bytes."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        found = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if found is None:
            return _Measured(limit + 1, {}, "needs more memory than a chip has")
        memory = int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))
        return _Measured(memory, {}, f"needs {found[1]} {found[2]}iB")
    return _Measured(memory_bytes(program), collective_bytes(program.as_text() or ""))


class DryRecords(Records):
    """Stand-ins for records, enough for every batch.

    Args:
      count: requests to train on.
    """

    def __init__(self, settings: DataSettings, audience: Audience, streams: Streams, count: int):
        super().__init__(settings, audience, streams, CorpusSettings(), lambda: True)
        self.count = count

    @functools.cached_property
    def requests(self) -> tuple[list[Request], list[Request]]:
        names: list[Request] = [f"request {i}" for i in range(2 * self.count)]
        return names[: self.count], names[self.count :]

    @functools.cached_property
    def completions(self) -> list[Example]:
        return [Example(prompt=request, completion="answer") for request in self.requests[0]]

    def comparisons(self, spec: SourceSpec, key: str) -> tuple[list[Example], str]:
        examples = [
            Example(prompt=request, chosen="one", rejected="other", user_id=f"user {i}", objective=name)
            for i, request in enumerate(self.requests[key.endswith(".heldout_data")])
            for name in self.audience.rewards
        ]
        return examples, "stand-ins"


def decoder_shapes(config: ModelConfig, dtype: str, quantize: str = "") -> Params:
    """Shapes of the parameters of a decoder, with kernels as `model.quantize` = `quantize` stores them."""
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in leaf_shapes(config).items()}
    tree, quantization = flax.traverse_util.unflatten_dict(leaves, sep="/"), get_quantization(quantize)
    return jax.eval_shape(functools.partial(quantize_params, quantization), tree) if quantization else tree


class DryWorkspace(Workspace):
    """Models whose weights and tokenizers are not read."""

    @property
    def base_hash(self) -> str:
        return "dry run"

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        path = self.settings.path
        if path and not os.path.isdir(path) and self.settings.vocab_size:
            return self.new_config()
        return read_config(config_folder(path)) if path else self.new_config()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        d, spec = self.records.settings, self.settings.tokenizer
        if isinstance(spec, str):
            trained = len(synthetic.vocabulary(synthetic.ENVIRONMENTS[spec]))
        else:
            trained = spec["vocab_size"]
        return _Tokenizer(d.max_prompt, d.max_completion, self.settings.vocab_size or trained)

    @functools.cached_property
    def base(self) -> Params:
        base = decoder_shapes(self.model_config, self.settings.param_dtype, self.settings.quantize)
        if self.adapter.freeze_a:
            base = with_a(base, jax.eval_shape(lambda: frozen_factors(base, self.adapter)))
        return self.devices.shard(base)

    def start_params(self, key: PRNGKey) -> Params:
        return self.base


class DryRun(Run):
    """A run on devices that are not here: parameters are shapes, and records are stand-ins of the greatest length."""

    def __init__(self, config: ml_collections.ConfigDict, topology: str):
        plan = read(config)
        nowhere = cast(Workdir, types.SimpleNamespace(path=pathlib.Path("dry_run")))
        super().__init__(plan.settings, plan.settings.sections, nowhere)
        self.audience = plan.settings.audience  # whose sources read no model
        self.topology, self.batch_rows = topology, 2 * max([64, *batch_sizes(config).values()])

    @functools.cached_property
    def devices(self) -> DryDevices:
        return DryDevices(self.settings.mesh, self.settings.data.max_completion, self.topology)

    @functools.cached_property
    def records(self) -> DryRecords:
        return DryRecords(self.settings.data, self.audience, self.streams, self.batch_rows)

    @functools.cached_property
    def workspace(self) -> DryWorkspace:
        s = self.settings
        return DryWorkspace(s.model, s.adapter, self.workdir, self.devices, self.records, "sft" in s.stages)

    @functools.cached_property
    def rewarder(self) -> Params:
        """What `algorithms.reward.load` reads in a real run."""
        K, found = len(self.audience.rewards), {}
        scale = {name: jax.ShapeDtypeStruct((K,), jnp.float32) for name in reward.SCALE}
        if self.audience.sources:
            scale["models"] = jax.ShapeDtypeStruct((K,), jnp.int32)
        if self.audience.learned:
            found = reward.method_of(self).init().trainable
        return {**found, **self.devices.shard(scale)}

    def answering(self, settings: SharedSettings) -> "DryRun":
        """The run with other settings of its base and texts, on the same devices."""
        other = copy.copy(self)
        for name in ("records", "workspace", "text", "rewarder", "_sampler"):
            vars(other).pop(name, None)
        other.settings = settings
        return other


def dry_pairs(run: DryRun, settings: PairSettings) -> Pairs:
    """Comparisons of `aot.users` people."""
    tables = tables_of(run, settings)
    reference = {name: np.zeros((len(table), len(SIDES)), np.float32) for name, table in tables.items()}
    return Pairs(tables, registry_of(run, tables["train"], run.settings.aot.users), reference, run.text)


def dry_modpo(run: DryRun, settings: modpo.ModpoSettings) -> Modpo:
    """The method, where what is asked of each pair before training is compiled, and then made up."""

    def raw(table: TokenTable) -> np.ndarray:
        compile_rewards(run)
        return np.zeros((len(table), len(SIDES), len(run.audience.rewards)), np.float32)

    def logps(table: TokenTable) -> np.ndarray:
        compile_reference(run, run.text.sample_rows)
        return np.zeros((len(table), len(SIDES)), np.float32)

    data = modpo.data_of(run, settings, raw, logps)
    return Modpo(settings, data, run.devices, run.workspace.backbone, run.text, run.streams)


def _answers(run: DryRun, count: int) -> PackedRows:
    """A chunk of `count` answers of the greatest length, two to each prompt, on the mesh."""
    d = run.settings.data
    answer = np.zeros(d.max_completion, np.int32)
    rows = [{"prompt": np.full(d.max_prompt, i // 2, np.int32), "completion": answer} for i in range(count)]
    answers = PackedAnswers(run.text, rows, count)
    return run.devices.place(answers.pack(answers.examples[: answers.size]))


def compile_reference(run: DryRun, count: int) -> None:
    """The log-probs of `count` answers under the reference."""
    with run.devices.part("reference"):
        run.devices.program(reference.summed_logps)(run.workspace.backbone, _answers(run, count))


def compile_rewards(run: DryRun) -> None:
    """The rewards of `run.text.sample_rows` answers by all reward models, if any."""
    if not run.audience.learned:
        return
    with run.devices.part("rewards"):
        answers = _answers(run, run.text.sample_rows)
        run.devices.program(modpo.scores)(run.workspace.backbone, run.rewarder, answers)


def compile_draw(run: DryRun, bank: Params | None = None, mix: Array | None = None) -> None:
    """Answers to `run.text.sample_rows` prompts of the greatest length by the base, or by adapters."""
    tokens = np.zeros((run.text.sample_rows, run.settings.data.max_prompt), np.int32)
    prompts = run.devices.place(Prompts(tokens, tokens.astype(bool)))  # pyright: ignore[reportArgumentType]
    draw = run.devices.program(run.sampler().draw)
    draw(run.workspace.backbone, bank, mix, prompts, run.streams.root)


def batch_sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Dotted key -> how many rows a step takes."""
    flat = flax.traverse_util.flatten_dict(config.to_dict(), sep=".")
    sizes = {str(key): value for key, value in flat.items() if isinstance(value, int)}
    return {key: value for key, value in sizes.items() if key.endswith((".batch_size", ".rollouts"))}


@functools.cache
def devices_of(topology: str) -> tuple[str, Sequence[Any]]:
    """(kind of chip, its devices) of a name such as v5e:4x4.

    Raises:
      UserError: a chip we know no figures of, or a topology that there is not, or no TPU compiler is installed.
    """
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise UserError(f"--aot={topology}: give chip:shape, for example v5e:4x4; chips are {', '.join(CHIPS)}")
    # The compiler needs no TPU, and so neither the cluster's metadata nor to be alone on this machine.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        # Of the chips with two cores, both work as one device.
        whole: dict[str, Any] = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
        if set(topology.partition(":")[2].split("x")) == {"1"}:  # hosts have four chips by default
            whole["chips_per_host_bounds"] = (1, 1, 1)
        return kind, topologies.get_topology_desc(topology, "tpu", **whole).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        if not importlib.util.find_spec("libtpu"):
            raise UserError(f"--aot={topology}: there is no TPU compiler here; {install('tpu')}") from error
        raise UserError(f"--aot={topology}: there is no such topology ({reason}); check the shape") from error
