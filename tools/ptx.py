"""Runs PTX, what NVRTC makes of CUDA source, on numpy: all threads side by side, those first that are furthest behind.

Memory is what was allowed: an access outside of it, unaligned, or to a byte that another thread has written raises
Fault; so does an instruction that is not known here. Registers are 64 bits wide. No shared memory, no barriers.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

TYPES = {
    "f32": np.float32, "f64": np.float64, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "b16": np.uint16, "b32": np.uint32,
    "b64": np.uint64, "b8": np.uint8, "pred": np.bool_,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Fault(Exception):
    """What a GPU would not have survived, or would have answered with anything."""


@dataclass
class Kernel:
    """An entry: parameters [(type, name)], code [(negated, predicate, opcode, operands)], labels {name: place}."""

    parameters: list
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)


def parse(text):
    """{name: Kernel} of a module."""
    kernels = {}
    for name, parameters, body in re.findall(r"\.entry (\w+)\((.*?)\)\s*\{(.*?)\n\}", text, re.S):
        kernel = kernels[name] = Kernel(re.findall(r"\.param \.(\w+) (\w+)", parameters))
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                kernel.labels[label[1]] = len(kernel.code)
            elif line and line[0] not in ".{}":
                negated, predicate, opcode, operands = LINE.fullmatch(line).groups()
                kernel.code.append((negated == "!", predicate, opcode, OPERAND.findall(operands)))
    return kernels


class Memory:
    """Arrays that kernels may use, at the addresses given; counts bytes loaded and stored."""

    def __init__(self):
        self.blocks, self.loaded, self.stored = [], Counter(), Counter()

    def allow(self, address, array):
        """Let kernels use an array's bytes (contiguous) at an address."""
        raw = array.reshape(-1).view(np.uint8)
        self.blocks.append((address, raw, np.full(len(raw), -1)))

    def places(self, addresses, size, what):
        """The number of the block that all addresses lie in, and the offsets of their bytes (n, size)."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"unaligned access, {what}")
        for number, (start, raw, _) in enumerate(self.blocks):
            if start <= int(addresses[0]) < start + len(raw):
                offsets = addresses.astype(np.int64) - start
                if (offsets < 0).any() or (offsets + size > len(raw)).any():
                    break
                return number, offsets[:, None] + np.arange(size)
        raise Fault(f"out-of-bounds access, {what}")

    def load(self, addresses, size, threads, what):
        """Bytes (n, size)."""
        number, places = self.places(addresses, size, what)
        _, raw, owners = self.blocks[number]
        if ((owners[places] != -1) & (owners[places] != threads[:, None])).any():
            raise Fault(f"one thread reads what another has written, {what}")
        self.loaded[number] += places.size
        return raw[places]

    def store(self, addresses, values, threads, what):
        """values: bytes (n, size)."""
        number, places = self.places(addresses, values.shape[1], what)
        _, raw, owners = self.blocks[number]
        taken = ((owners[places] != -1) & (owners[places] != threads[:, None])).any()
        if taken or len(np.unique(places)) < places.size:
            raise Fault(f"two threads write one address, {what}")
        raw[places], owners[places] = values, threads[:, None]
        self.stored[number] += places.size


class Machine:
    """One launch of a kernel."""

    def __init__(self, kernel, blocks, threads, arguments, memory):
        if len(arguments) != len(kernel.parameters):
            raise Fault(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
        self.kernel, self.memory, self.count = kernel, memory, blocks * threads
        self.parameters = {}
        for (kind, name), argument in zip(kernel.parameters, arguments, strict=True):
            given = np.asarray(argument)
            if given.dtype.itemsize != np.dtype(TYPES[kind]).itemsize or (given.dtype.kind == "f") != (kind[0] == "f"):
                raise Fault(f"parameter {name} is .{kind}, the argument {given.dtype}")
            self.parameters[name] = int(given.reshape(1).view(f"u{given.dtype.itemsize}")[0])
        every = np.arange(self.count)
        known = {"%tid.x": every % threads, "%ctaid.x": every // threads, "%ntid.x": every * 0 + threads}
        self.registers = {name: values.astype(np.uint64) for name, values in known.items()}

    def run(self):
        """To the end of every thread."""
        places = np.zeros(self.count, np.int64)
        end = len(self.kernel.code)
        while (place := places.min()) < end:
            self.active = np.nonzero(places == place)[0]
            negated, predicate, opcode, operands = self.kernel.code[place]
            if predicate:
                self.active = self.active[self.registers[predicate][self.active].astype(bool) != negated]
            places[places == place] += 1
            base = opcode.split(".")[0]
            if base == "bra":
                places[self.active] = self.kernel.labels[operands[0]]
            elif base in ("ret", "exit"):
                places[self.active] = end
            elif len(self.active):
                self.execute(opcode, operands)

    def execute(self, opcode, operands):
        """One instruction that is no jump, by the active threads."""
        base, *parts = opcode.split(".")
        with np.errstate(all="ignore"):
            if base in ("ld", "st"):
                self.access(base, parts, operands, opcode)
            elif base == "mov" and "{" in "".join(operands):
                self.repack(parts[0], operands)
            elif base == "setp":
                self.write(operands[0], "pred", self.compared(parts, operands[1:]))
            elif base == "cvt":
                self.write(operands[0], parts[-2], converted(self.read(operands[1], parts[-1]), parts))
            elif base == "selp":
                a, b = (self.read(operand, parts[-1]) for operand in operands[1:3])
                self.write(operands[0], parts[-1], np.where(self.read(operands[3], "pred"), a, b))
            else:
                self.calculate(base, parts, operands, opcode)

    def access(self, base, parts, operands, opcode):
        """Loads and stores."""
        kind, many = TYPES[parts[-1]], next((int(part[1]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        place, registers = operands if base == "st" else operands[::-1]
        name, _, offset = place.strip("[]").partition("+")
        if "param" in parts:
            bits = np.full(len(self.active), self.parameters[name] >> 8 * int(offset or 0), np.uint64)
            self.put(registers, bits)
            return
        if "global" not in parts:
            raise Fault(f"unknown instruction {opcode}")
        addresses = self.read(name, "u64") + np.uint64(int(offset or 0) & (1 << 64) - 1)
        names, size = registers.strip("{}").replace(" ", "").split(","), np.dtype(kind).itemsize
        if base == "ld":
            raw = self.memory.load(addresses, many * size, self.active, opcode)
            for number, register in enumerate(names):
                own = np.ascontiguousarray(raw[:, number * size : (number + 1) * size])
                self.write(register, parts[-1], own.view(kind)[:, 0])
        else:
            own = [np.ascontiguousarray(self.read(register, parts[-1])).view(np.uint8) for register in names]
            raw = np.concatenate([part.reshape(len(self.active), size) for part in own], 1)
            self.memory.store(addresses, raw, self.active, opcode)

    def repack(self, kind, operands):
        """A register of the halves of another, or the other way round."""
        total = 8 * np.dtype(TYPES[kind]).itemsize
        if operands[0].startswith("{"):
            bits, names = self.read(operands[1], kind).astype(np.uint64), re.findall(r"[%_]\w*", operands[0])
            for number, name in enumerate(names):
                width = np.uint64(total // len(names))
                if name != "_":
                    self.put(name, bits >> np.uint64(number) * width & (np.uint64(1) << width) - np.uint64(1))
            return
        names = re.findall(r"%\w+|[-\w]+", operands[1])
        width, bits = total // len(names), np.zeros(len(self.active), np.uint64)
        for number, name in enumerate(names):
            bits |= self.read(name, f"u{width}").astype(np.uint64) << np.uint64(number * width)
        self.put(operands[0], bits)

    def compared(self, parts, operands):
        """setp: ordered, or with u at the end of its name true for NaN as well."""
        comparison, kind = parts[0], parts[-1]
        a, b = (self.read(operand, kind) for operand in operands[:2])
        if comparison in ("num", "nan"):
            return (np.isnan(a) | np.isnan(b)) == (comparison == "nan")
        if comparison in COMPARISONS:
            known = ~(np.isnan(a) | np.isnan(b)) if kind[0] == "f" else True
            return COMPARISONS[comparison](a, b) & known
        return COMPARISONS[comparison[:-1]](a, b) | np.isnan(a) | np.isnan(b)

    def calculate(self, base, parts, operands, opcode):
        """Arithmetic: a destination, then sources."""
        kind = parts[-1]
        if base in ("shl", "shr"):
            a, count = self.read(operands[1], kind), self.read(operands[2], "u32")
            bits = np.uint32(8 * np.dtype(TYPES[kind]).itemsize)
            shift = np.minimum(count, bits - np.uint32(1)).astype(a.dtype)
            moved = a << shift if base == "shl" else a >> shift
            self.write(operands[0], kind, moved if kind[0] == "s" else np.where(count < bits, moved, a.dtype.type(0)))
            return
        sources = [self.read(operand, kind) for operand in operands[1:]]
        if base in ("mul", "mad") and parts[0] in ("wide", "hi"):
            wide = TYPES[f"{kind[0]}64"]
            product = sources[0].astype(wide) * sources[1].astype(wide)
            if parts[0] == "wide":
                self.write(operands[0], f"{kind[0]}64", product)
            else:
                self.write(operands[0], kind, (product >> wide(32)).astype(TYPES[kind]))
            return
        operation = OPERATIONS.get(base)
        if operation is None:
            raise Fault(f"unknown instruction {opcode}")
        self.write(operands[0], kind, operation(parts, *sources))

    def read(self, operand, kind):
        """Values of an operand as numbers of a type, of the active threads."""
        dtype = np.dtype(TYPES[kind])
        if operand.startswith(("0f", "0d")):
            value = np.array([int(operand[2:], 16)], np.uint32 if operand[1] == "f" else np.uint64).view(dtype)[0]
            return np.full(len(self.active), value, dtype)
        if operand[0] != "%":
            return (
                np.full(len(self.active), int(operand.rstrip("U"), 0) & (1 << 64) - 1, np.uint64)
                .view(np.int64)
                .astype(dtype)
            )
        bits = self.registers[operand][self.active]
        if kind == "pred":
            return bits.astype(bool)
        return bits.astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, register, kind, values):
        """Values into a register of the active threads."""
        values = np.ascontiguousarray(values, TYPES[kind])
        self.put(register, values.view(f"u{values.dtype.itemsize}").astype(np.uint64))

    def put(self, register, bits):
        """Bits into a register of the active threads."""
        self.registers.setdefault(register, np.zeros(self.count, np.uint64))[self.active] = bits


def rounded(parts, exact, kind):
    """A float64 (or wider) result in the type, to the side that rm or rz says; else to the nearest."""
    result = exact.astype(kind)
    if "rm" in parts:
        return np.where(result > exact, np.nextafter(result, kind(-np.inf)), result)
    if "rz" in parts:
        return np.where(np.abs(result) > np.abs(exact), np.nextafter(result, kind(0)), result)
    return result


def wide_of(values):
    """Numbers in a type that holds products of theirs."""
    return values.astype(np.longdouble if values.dtype == np.float64 else np.float64)


def arithmetic(function):
    """An operation of numbers: floats are rounded as it says, integers wrap."""

    def operation(parts, *sources):
        kind = sources[0].dtype.type
        if sources[0].dtype.kind != "f":
            return function(*sources)
        result = rounded(parts, function(*map(wide_of, sources)), kind)
        return np.clip(result, 0, 1) if "sat" in parts else result

    return operation


def quotient(a, b):
    """As integers of C, or a fraction."""
    if a.dtype.kind == "f":
        return a / b
    return np.trunc(a / b).astype(a.dtype)


OPERATIONS = {
    "mov": lambda parts, a: a,
    "cvta": lambda parts, a: a,
    "add": arithmetic(lambda a, b: a + b),
    "sub": arithmetic(lambda a, b: a - b),
    "mul": arithmetic(lambda a, b: a * b),
    "mad": arithmetic(lambda a, b, c: a * b + c),
    "fma": arithmetic(lambda a, b, c: a * b + c),
    "div": arithmetic(quotient),
    "rem": lambda parts, a, b: np.fmod(a, b),
    "rcp": arithmetic(lambda a: 1 / a),
    "ex2": arithmetic(np.exp2),
    "neg": lambda parts, a: -a,
    "abs": lambda parts, a: np.abs(a),
    "min": lambda parts, a, b: np.fmin(a, b),
    "max": lambda parts, a, b: np.fmax(a, b),
    "copysign": lambda parts, a, b: np.copysign(b, a),
    "and": lambda parts, a, b: a & b,
    "or": lambda parts, a, b: a | b,
    "xor": lambda parts, a, b: a ^ b,
    "not": lambda parts, a: ~a,
}


def converted(values, parts):
    """cvt: to a type, by way of rounding to whole numbers (rni, rmi, rzi) and saturation."""
    target = TYPES[parts[-2]]
    for part, function in (("rni", np.rint), ("rmi", np.floor), ("rzi", np.trunc)):
        values = function(values) if part in parts else values
    if "sat" in parts:
        values = np.nan_to_num(np.clip(values, 0, 1), nan=0.0)
    return values.astype(target)
