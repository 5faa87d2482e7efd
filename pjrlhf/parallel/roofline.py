"""Roofline model of a compiled program: FLOPs, bytes and collectives per chip, and the lower bound on its time.

FLOPs and bytes count the matmuls of the traced program, loops included, divided evenly among chips; other operations of
a transformer are negligible. XLA's cost analysis counts the body of a loop once and so underestimates scanned layers.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Jaxpr
from jax.stages import Compiled


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak figures of one chip.

    Attributes:
      flops: bf16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: bytes/s of HBM.
      interconnect: bytes/s sent over all links together.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# Source: cloud.google.com/tpu/docs, system architecture pages.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 2400e9 / 8),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 1600e9 / 8),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 4800e9 / 8),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 3584e9 / 8),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of a program on all chips together: FLOPs, and bytes that its matmuls read and write."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


# Primitives of `jax.nn.dot_product_attention` on cuDNN -> number of matmuls.
_FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def matmul_cost(jaxpr: Jaxpr, trip_count: int = 1) -> Cost:
    """Cost of the matmuls of a jaxpr; loops without a static length run `trip_count` times.

    A matmul of [..., m, k] and [..., k, n] takes 2 m k n FLOPs per batch element. An operand converted from integers is
    read as integers; one made of 4-bit codes is not a conversion, and counts as floats. cuDNN attention counts as two
    matmuls forward and four backward, halved if causal; its backward pass also recomputes the first one, which is not
    counted.
    """
    total, integers = Cost(), {}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        operands: list[Any] = [x.aval for x in equation.invars]
        results: list[Any] = [x.aval for x in equation.outvars]
        if name == "convert_element_type" and jnp.issubdtype(operands[0].dtype, jnp.integer):
            integers[id(equation.outvars[0])] = operands[0]
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(operands[0].shape[axis] for axis in contracting)
            read = [integers.get(id(x), aval) for x, aval in zip(equation.invars, operands, strict=True)]
            total += Cost(2.0 * math.prod(results[0].shape) * depth, _bytes([*read, *results]))
            continue
        if name in _FUSED:
            (B, T, Hq, Dh), M = operands[0].shape, operands[1].shape[1]
            seen = (T + 1) / 2 if "CAUSAL" in str(equation.params["mask_type"]) else M
            total += Cost(_FUSED[name] * 2.0 * B * Hq * T * seen * Dh, _bytes([*operands, *results]))
            continue
        inner = [matmul_cost(part, trip_count) for part in _subjaxprs(equation.params)]
        if not inner:
            continue
        if name == "pallas_call":  # operands of its matmuls are blocks on the chip: bytes are those of the call
            programs = math.prod(equation.params["grid_mapping"].grid)
            total += Cost(programs * sum(cost.flops for cost in inner), _bytes([*operands, *results]))
        elif name == "shard_map":  # every device runs it
            total += sum(inner, Cost()) * equation.params["mesh"].size
        elif name == "cond":
            total += max(inner, key=lambda cost: cost.flops)
        else:
            trips = {"scan": equation.params.get("length", 1), "while": trip_count}.get(name, 1)
            total += sum(inner, Cost()) * trips
    return total


def _bytes(avals: Sequence[ShapedArray]) -> int:
    """Bytes of arrays of these shapes and dtypes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in avals)


def _subjaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr") and hasattr(part.jaxpr, "eqns"):
                yield part.jaxpr


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{$", re.MULTILINE)
_COLLECTIVE = re.compile(
    r"= (?P<shape>[^=\n]*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_CALLS = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=\{?%?([\w.\-]+(?:, %?[\w.\-]+)*)\}?")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"[su]32\[\][^=]* constant\((\d+)\)")


def _array_bytes(text: str) -> list[int]:
    """Sizes in bytes of the array types in HLO text, in order."""
    sizes = []
    for dtype, shape in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
        sizes.append(math.prod(int(n) for n in shape.split(",") if n) * bits // 8)
    return sizes


def _group(line: str) -> int:
    """Number of chips in a group of the collective on this line of HLO."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", found[2]) if name in sizes)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    return 1


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that each chip sends per run of a compiled program, by kind of collective, from its HLO text.

    In a ring of g chips, an all-gather or reduce-scatter of r bytes sends r (g - 1) / g, an all-reduce twice that.
    The trip count of a loop is the largest constant in its condition.
    """
    starts = list(_COMPUTATION.finditer(hlo))
    bodies = {
        match[1]: hlo[match.end() : (starts[i + 1].start() if i + 1 < len(starts) else len(hlo))]
        for i, match in enumerate(starts)
    }
    entry = next((match[1] for match in starts if hlo.startswith("ENTRY", match.start())), None)
    # An async collective spans several computations, each with a copy of the instruction on the same channel. Its
    # start is the copy that runs least often.
    found: dict[str, tuple[str, float]] = {}

    def trip_count(name: str) -> int:
        body = bodies.get(name, "")
        numbers = [int(x) for x in _CONSTANT.findall(body)]
        numbers += [trip_count(one) for called in _CALLS.findall(body) for one in _names(called)]
        return max(numbers, default=1)

    def walk(name: str, times: int) -> None:
        for number, line in enumerate(bodies.get(name, "").splitlines()):
            if match := _COLLECTIVE.search(line):
                # A collective may combine several arrays. An async start, however, lists operand and result.
                pair = match["start"] and match["kind"] != "all-reduce"
                size, g = (max if pair else sum)(_array_bytes(match["shape"]) or [0]), _group(line)
                ring = size * (g - 1) / g
                moved = {"all-reduce": 2 * ring, "reduce-scatter": size * (g - 1), "collective-permute": size}
                sent = times * moved.get(match["kind"], ring)
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name} {number}"
                if key not in found or sent < found[key][1]:
                    found[key] = match["kind"], sent
            if loop := _WHILE.search(line):
                walk(loop[2], times * trip_count(loop[1]))
            else:
                for called in _CALLS.findall(line):
                    for one in _names(called):
                        walk(one, times)

    if entry:
        walk(entry, 1)
    total: dict[str, float] = {}
    for kind, sent in found.values():
        total[kind] = total.get(kind, 0.0) + sent
    return total


def _names(called: str) -> list[str]:
    return [name.strip(" %") for name in called.split(",")]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Lower bounds in seconds on a program's time: matmuls at peak FLOP/s, HBM traffic, and collectives.

    `seconds` is the largest of them and `bound` its name.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def estimate(chip: Chip, chips: int, cost: Cost, sent: float) -> Estimate:
    """Roofline of a program of `cost` on `chips` chips, each of which sends `sent` bytes."""
    return Estimate(
        cost.flops / chips / chip.flops,
        cost.bytes / chips / chip.bandwidth,
        sent / chip.interconnect,
    )


def memory_bytes(compiled: Compiled) -> int:
    """Peak bytes of a compiled program on one device: arguments, results, temporaries and code."""
    m: Any = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return int(held + m.temp_size_in_bytes + m.generated_code_size_in_bytes)
