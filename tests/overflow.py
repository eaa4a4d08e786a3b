"""Which 32-bit integers of a Triton kernel may overflow: intervals of all integers in its IR.

Offsets past 2^31 elements need 64 bits. Who forgets that computes them in 32, which no compiler
reports. Here each integer of a kernel gets the interval that it may lie in, from the sizes and
strides of one call and from its grid; no memory is there, nothing runs.
"""

import math
import re

_LINE = re.compile(r"\s*(?:(%[\w:]+) = )?(tt\.func|[a-z_]+\.[\w.]+)(.*)")
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_TYPE = re.compile(r"\bi\d+|(?<=\dx)i\d+")
_AXES = {"x": 0, "y": 1, "z": 2}
_LIMITS = {"i32": 2**31, "i64": 2**63}

Interval = tuple[int, int]

#: What only memory knows is the number of a row, of a sequence or of a turn of the loop.
_READ: Interval = (0, 2**22)


def overflows(ttir: str, arguments: dict[str, object], grid: tuple[int, ...]) -> list[str]:
    """The lines of `ttir` whose integer may leave its 32 or 64 bits.

    Args:
        ttir: the IR of a compiled kernel.
        arguments: what the kernel was called with, by the names of its parameters.
        grid: the programs along each axis.
    """
    known: dict[str, Interval] = {}
    captured: list[Interval] = []
    found = []
    for line in ttir.splitlines():
        line = re.sub(r" loc\([^()]*\)", "", line)
        partition = re.search(r"partition\d+\((.*?)\) num_warps", line)
        if partition:  # of a warp-specialised kernel, which is given what `captured` names
            known |= zip(_VALUE.findall(partition[1]), captured, strict=True)
            continue
        match = _LINE.match(line)
        if match is None:
            continue
        result, op, rest = match.groups()
        if op == "tt.func":
            for name in re.findall(r"%(\w+): i\d+", line):
                if isinstance(arguments.get(name), int):  # else a number of a descriptor
                    known[f"%{name}"] = (arguments[name],) * 2
            continue
        if op == "ttg.warp_specialize":
            captured = [known.get(name, _READ) for name in _VALUE.findall(rest.split(")")[0])]
            continue
        if op == "scf.for":
            index, *bounds = _VALUE.findall(rest)[:3]
            low, high = (known.get(bound, _READ) for bound in bounds)
            known[index] = low[0], max(low[0], high[1] - 1)
            continue
        operands = [known.get(name, _READ) for name in _VALUE.findall(rest)]
        value = _interval(op, rest, operands, grid)
        kinds = _TYPE.findall(line)
        if result is None or value is None or not kinds:
            continue
        known[result] = value
        limit = _LIMITS.get(kinds[-1], math.inf)
        if not -limit <= value[0] <= value[1] < limit:
            found.append(line.strip())
            known[result] = 0, 0  # to name what is wrong once
    return found


def _interval(
    op: str, rest: str, operands: list[Interval], grid: tuple[int, ...]
) -> Interval | None:
    """What an operation on integers makes of these; None where that is not known."""
    if op == "arith.constant":
        number = re.match(r" (?:dense<)?(-?\d+)>? : (?:tensor<.*)?i\d+", rest)
        return (int(number[1]),) * 2 if number else None
    if op == "tt.get_program_id":
        return 0, (*grid, 1, 1)[_AXES[rest.split()[0]]] - 1
    if op == "tt.get_num_programs":
        return ((*grid, 1, 1)[_AXES[rest.split()[0]]],) * 2
    if op == "tt.make_range":
        end, start = (int(re.search(rf"{name} = (\d+)", rest)[1]) for name in ("end", "start"))
        return start, end - 1
    if op == "arith.select":
        operands = operands[1:]
    (a, b), (c, d) = (operands[0], operands[-1]) if operands else (_READ, _READ)
    if op in _SAME:
        return a, b
    if op == "arith.addi":
        return a + c, b + d
    if op == "arith.subi":
        return a - d, b - c
    if op == "arith.muli":
        products = a * c, a * d, b * c, b * d
        return min(products), max(products)
    if op == "arith.divsi":  # by what is one at least, as all divisors are
        quotients = [int(n / m) for n in (a, b) for m in (max(c, 1), max(d, 1))]
        return min(quotients), max(quotients)
    if op == "arith.remsi":
        return max(1 - d, min(a, 0)), min(d - 1, max(b, 0))
    if op == "arith.minsi":
        return min(a, c), min(b, d)
    if op == "arith.maxsi":
        return max(a, c), max(b, d)
    if op == "arith.select":
        return min(a, c), max(b, d)
    return None


_SAME = {
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
}
