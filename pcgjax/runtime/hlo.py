"""Reads a compiled program's HLO: work, bytes and collectives of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
# One floating-point operation an element of the result. Transcendental functions are several; one is counted.
ARITHMETIC = {
    "abs", "add", "atan2", "cbrt", "ceil", "clamp", "cosine", "divide", "erf", "exponential",
    "exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate",
    "power", "remainder", "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "sign", "sine", "sqrt",
    "subtract", "tan", "tanh",
}  # fmt: skip
# No bytes move for these, or they are counted inside what they call.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "optimization-barrier", "async-start", "async-update", "async-done", "partition-id", "replica-id", "iota",
}  # fmt: skip


class Collective(NamedTuple):
    """One instruction that sends between devices, or reduces over them."""

    kind: str  # of KINDS
    bytes: int  # the whole array's: what each device puts into a reduction, what a gather yields
    group_size: int  # devices that take part with each other
    times: int  # executions a step, or, outside the step, a call of the program
    where: str  # "step" or "outside"
    branch: str  # of the conditionals it is in, "cond.1 2/3": the second of three; "": in none
    counted: bool  # False in a branch that is not the dearest
    name: str  # the instruction's

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends for it, all its executions together."""
        return self.times * wire_bytes(self.kind, self.bytes, self.group_size)


class Step(NamedTuple):
    """One step of a compiled program, per device."""

    flops: float
    bytes_accessed: float  # by the fused instructions as this compiler made them; another's fuse otherwise
    wire_bytes: float
    collectives: list[Collective]  # all of the program's
    branches: dict[str, dict[str, float]]  # each branch of the step's conditionals: its flops and wire_bytes
    uncounted: list[str]  # loops of unknown length, counted as one turn, and library calls, whose flops are unknown


def wire_bytes(kind: str, size: float, n: int) -> float:
    """Bytes that each of `n` devices sends for one collective by the ring algorithms, which send the fewest possible.

    size: bytes of the whole array, as `Collective.bytes`. The factors are those of NCCL's bus bandwidth
    (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md); that no all-reduce sends less: Patarasuk and Yuan, Bandwidth
    optimal all-reduce algorithms for clusters of workstations, 2009.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"collective {kind!r}: choose one of {', '.join(KINDS)}")
    if n < 2:
        return 0.0
    if kind == "all-reduce":
        return 2 * (n - 1) / n * size
    return float(size) if kind in ("collective-permute", "collective-broadcast") else (n - 1) / n * size


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool


class _Program(NamedTuple):
    computations: dict[str, dict[str, _Instruction]]
    entry: str
    devices: int


class _Cost(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    branches: tuple[tuple[str, float, float], ...] = ()
    uncounted: tuple[str, ...] = ()


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"not a line of HLO: {text[:80]!r}")


def _parse(text: str) -> _Program:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, body = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line[:1].isspace():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            body = computations.setdefault(header[2], {}) if header and header[2] != "HloModule" else None
            if header and header[1]:
                entry = header[2]
            continue
        found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
        if body is None or not found:
            continue
        rest = line[found.end() :]
        end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
        opens = rest.index("(", end)
        closes = _closing(rest, opens)
        operands = [word.split()[-1].lstrip("%") for word in rest[opens + 1 : closes].split(", ") if word.strip()]
        body[found[2]] = _Instruction(
            found[2], rest[:end], rest[end:opens].strip(), operands, rest[closes + 1 :], bool(found[1])
        )
    if not entry:
        raise ValueError("not the text of a compiled program: give compiled.as_text(), which has an ENTRY")
    module = text[: text.find("\n")]
    counts = [re.search(rf"\b{name}=(\d+)", module) for name in ("num_partitions", "replica_count")]
    return _Program(computations, entry, math.prod(int(count[1]) for count in counts if count))


def _arrays(type_: str) -> Iterator[tuple[str, list[int]]]:
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", type_):
        yield dtype, [int(length) for length in re.findall(r"\d+", dims)]


def _bytes(type_: str) -> int:
    def width(dtype: str) -> float:
        if dtype in ("token", "opaque"):
            return 0
        bits = re.search(r"\d+", dtype)  # pred has none: a byte
        return int(bits[0]) / 8 if bits else 1

    return math.ceil(sum(width(dtype) * math.prod(dims) for dtype, dims in _arrays(type_)))


def _elements(type_: str) -> int:
    return sum(math.prod(dims) for _, dims in _arrays(type_))


def _group_size(attributes: str, devices: int) -> int:
    """Devices in a group of `replica_groups`: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'a'} or {}: all."""
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return max(len(re.findall(r"\d+", group)) for group in found[1].split("},"))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return math.prod(int(length) for length in found[1].split(",")[1:])
    if found := re.search(r"replica_groups=(?:@?\w+)?\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        lengths = dict(re.findall(r"([\w']+)=(\d+)", found[1]))
        # An axis may be taken in part: 'a':(2)4 are 4 devices of it, 2 apart.
        axes = re.findall(r"([\w']+)(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or lengths[axis]) for axis, part in axes)
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return len(set(re.findall(r"\d+", found[1])))
    return devices


def _names(attributes: str, field: str) -> list[str]:
    """The computations that an attribute names: calls=%a, branch_computations={%a, %b}."""
    found = re.search(rf"\b{field}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", attributes)
    return [word.strip().lstrip("%") for word in (found[1] or found[2] or "").split(",")] if found else []


def _turns(instruction: _Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else None


def _lengths(attributes: str, pattern: str) -> int:
    """The product of the numbers in what `pattern` captures; 1 where it is not found."""
    found = re.search(pattern, attributes)
    return math.prod(int(n) for n in re.findall(r"\d+", found[1])) if found else 1


def _flops(x: _Instruction, body: dict[str, _Instruction]) -> float:
    if not re.match(r"\(?(f|bf|c)\d", x.type):
        return 0.0
    if x.opcode in ARITHMETIC:
        return _elements(x.type)
    if x.opcode == "reduce":
        return _elements(body[x.operands[0]].type)
    if x.opcode == "reduce-window":
        return _elements(x.type) * _lengths(x.attributes, r"size=([\dx]+)")
    if x.opcode == "fft":
        # Cooley and Tukey's: 5 n log2 n of complex values, half of that where one side is real.
        n = _lengths(x.attributes, r"fft_length=\{([\d,]+)\}")
        real = "fft_type=FFT" not in x.attributes and "fft_type=IFFT" not in x.attributes
        count = max(_elements(x.type), _elements(body[x.operands[0]].type))
        return (2.5 if real else 5.0) * count * math.log2(n)
    if x.opcode == "dot":
        dims = next(_arrays(body[x.operands[0]].type))[1]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", x.attributes)
        summed = [dims[int(axis)] for axis in contracted[1].split(",")] if contracted else []
        return 2.0 * _elements(x.type) * math.prod(summed)
    if x.opcode == "convolution":
        kernel = next(_arrays(body[x.operands[1]].type))[1]
        labels = re.search(r"dim_labels=\w+_(\w+)->", x.attributes)
        outputs = kernel[labels[1].index("o")] if labels else 1
        # The zeros between the samples of a dilated input, as in a strided convolution's gradient, are not multiplied.
        zeros = _lengths(x.attributes, r"lhs_dilate=([\dx]+)")
        return 2.0 * _elements(x.type) * math.prod(kernel) / outputs / zeros
    return 0.0


def _accessed(x: _Instruction, body: dict[str, _Instruction], program: _Program) -> float:
    """Bytes that one instruction reads and writes: of an array that it slices or changes in place, the part."""

    def size(name: str, within: dict[str, _Instruction] = body) -> int:
        return _bytes(within[name].type) if name in within else 0

    if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
        return 0.0
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(x.type) + sum(map(size, x.operands[1:]))
    if x.opcode == "dynamic-update-slice":
        return 2 * size(x.operands[1]) + sum(map(size, x.operands[2:]))
    if x.opcode == "scatter":
        return 3 * size(x.operands[-1]) + size(x.operands[1])
    if x.opcode != "fusion":
        return _bytes(x.type) + sum(map(size, x.operands))
    inside = program.computations[_names(x.attributes, "calls")[0]]

    def read(name: str, whole: int) -> float:
        total = 0.0
        for user in (y for y in inside.values() if name in y.operands):
            first = user.operands[0] == name
            if first and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _bytes(user.type)
            elif user.opcode == "bitcast":
                total += read(user.name, whole)
            elif not (first and user.opcode == "dynamic-update-slice"):
                return whole
        return min(total, whole)

    def written(name: str) -> float:
        y = inside[name]
        if y.opcode == "tuple":
            return sum(map(written, y.operands))
        if y.opcode == "bitcast":
            return written(y.operands[0])
        return size(y.operands[1], inside) if y.opcode == "dynamic-update-slice" else _bytes(y.type)

    reads = sum(read(y.name, _bytes(y.type)) for y in inside.values() if y.opcode == "parameter")
    return reads + sum(written(y.name) for y in inside.values() if y.root)


def _wire(cost: _Cost) -> float:
    return sum(c.wire_bytes for c in cost.collectives if c.counted)


def _sum(costs: list[_Cost]) -> _Cost:
    return _Cost(
        sum(c.flops for c in costs),
        sum(c.bytes for c in costs),
        tuple(x for c in costs for x in c.collectives),
        tuple(x for c in costs for x in c.branches),
        tuple(x for c in costs for x in c.uncounted),
    )


def _repeated(cost: _Cost, turns: int) -> _Cost:
    return cost._replace(
        flops=cost.flops * turns,
        bytes=cost.bytes * turns,
        collectives=tuple(c._replace(times=c.times * turns) for c in cost.collectives),
        branches=tuple((name, flops * turns, wire * turns) for name, flops, wire in cost.branches),
    )


def _dearest(name: str, costs: list[_Cost]) -> _Cost:
    """A conditional: the most FLOPs, memory and wire bytes of any branch; the collectives of all, marked."""
    wires = [_wire(cost) for cost in costs]
    dearest = wires.index(max(wires))
    collectives, branches = [], []
    for place, cost in enumerate(costs):
        label = f"{name} {place + 1}/{len(costs)}"
        branches.append((label, cost.flops, wires[place]))
        branches += [(f"{label}, {inner}", flops, wire) for inner, flops, wire in cost.branches]
        for c in cost.collectives:
            inner = f"{label}, {c.branch}" if c.branch else label
            collectives.append(c._replace(branch=inner, counted=c.counted and place == dearest))
    together = _sum(costs)
    return _Cost(
        max(c.flops for c in costs),
        max(c.bytes for c in costs),
        tuple(collectives),
        tuple(branches),
        together.uncounted,
    )


def _cost(program: _Program, computation: str, fused: bool = False, without: str = "") -> _Cost:
    """Of one run of a computation; `without`: the name of an instruction to leave out."""
    body = program.computations[computation]
    costs = []
    for x in body.values():
        if x.name == without:
            continue
        kind = x.opcode.removesuffix("-start")
        costs.append(_Cost(_flops(x, body), 0.0 if fused else _accessed(x, body, program)))
        if kind in KINDS:
            group = _group_size(x.attributes, program.devices)
            # What goes in, since a -start's result also holds its operands.
            size = sum(_bytes(body[name].type) for name in x.operands) * (group if kind == "all-gather" else 1)
            costs.append(_Cost(collectives=(Collective(kind, size, group, 1, "step", "", True, x.name),)))
        elif kind == "while":
            turns = _turns(x)
            inner = _cost(program, _names(x.attributes, "body")[0])
            if turns is None:
                inner = inner._replace(uncounted=(*inner.uncounted, f"loop {x.name}: of unknown length"))
            costs.append(_repeated(inner, 1 if turns is None else turns))
        elif kind == "conditional":
            names = _names(x.attributes, "branch_computations") or [
                name for field in ("true_computation", "false_computation") for name in _names(x.attributes, field)
            ]
            costs.append(_dearest(x.name, [_cost(program, name) for name in names]))
        elif kind in ("fusion", "call", "async"):
            for name in _names(x.attributes, "calls") or _names(x.attributes, "to_apply"):
                costs.append(_cost(program, name, fused=fused or kind == "fusion"))
        elif kind == "custom-call" and re.search(r'target="[^"]*(gemm|matmul|conv|dot|triton|mosaic)', x.attributes):
            costs.append(_Cost(uncounted=(f"library call {x.name}: its flops",)))
    return _sum(costs)


def step_cost(hlo_text: str) -> Step:
    """What one step costs a device. hlo_text: `compiled.as_text()` of a program that runs many steps, or of one.

    The step is the body of the entry's loop of unknown length, the one with most FLOPs where there are several: the
    first and last step must be arguments of the program, not constants. A program without such a loop is one step.
    FLOPs: two for each product of a dot or a convolution, one for each element of an arithmetic instruction's result or
    a reduction's input.

    Raises:
      ValueError: a text that has no ENTRY.
    """
    program = _parse(hlo_text)
    loops = [x for x in program.computations[program.entry].values() if x.opcode == "while" and _turns(x) is None]
    bodies = {x.name: _cost(program, _names(x.attributes, "body")[0]) for x in loops}
    outside = ""
    step = _Cost()
    if bodies:
        outside = max(bodies, key=lambda name: bodies[name].flops)
        step = bodies[outside]
    rest = _cost(program, program.entry, without=outside)
    if not bodies:
        step, rest = rest, _Cost()
    others = [c._replace(where="outside") for c in rest.collectives]
    return Step(
        step.flops,
        step.bytes,
        _wire(step),
        [*step.collectives, *others],
        {name: {"flops": flops, "wire_bytes": wire} for name, flops, wire in step.branches},
        sorted({*step.uncounted, *rest.uncounted}),
    )


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of a compiled program, as `step_cost` finds them."""
    return step_cost(hlo_text).collectives
