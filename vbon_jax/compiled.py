"""What a compiled program moves between devices, read off its HLO.

XLA decides which collectives a mesh costs; the source does not say. The text is that of
``jax.stages.Compiled.as_text()``.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # others end with theirs: s32, u8

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(-start)?\((.*)$"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of KINDS.
      shapes: what it results in on each device, (dtype, dimensions) of each array.
      devices: that take part with each other.
      path: the named scopes and operation it comes from.
      loops: how many loops it is inside of.
      times: how often a run of the program does it, at most; inside a loop of which neither the
        trips nor a limit of them are written, how often a trip does.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    path: str
    loops: int
    times: int

    @property
    def size(self) -> int:
        """Bytes of the whole arrays: gathered, reduced, or before they are scattered."""
        own = sum(math.prod(shape) * bits_of(dtype) // 8 for dtype, shape in self.shapes)
        return own * self.devices if self.kind == "reduce-scatter" else own

    @property
    def moved(self) -> float:
        """Bytes that each device sends, by a ring, in one run of it."""
        if self.kind == "collective-permute":
            return self.size
        share = (self.devices - 1) / self.devices
        return self.size * share * (2 if self.kind == "all-reduce" else 1)


def bits_of(dtype: str) -> int:
    """Bits of an element of an HLO type."""
    return BITS.get(dtype) or int(re.sub(r"\D", "", dtype))


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program that move something between devices.

    Args:
      text: its HLO.

    Returns:
      In the order of the text. Those of several runs in one loop are one, with their ``times``.
    """
    bodies = dict(_computations(text))
    runs = _runs(bodies)
    found: dict[tuple[Any, ...], Collective] = {}
    for name, lines in bodies.items():
        scattered = "all-reduce-scatter" in name  # how libtpu writes a reduce-scatter
        here: Counter[tuple[Any, ...]] = Counter()
        for line in lines:
            match = _OPERATION.match(line)
            if not match or name not in runs:
                continue
            result, kind, start, rest = match.groups()
            devices = _devices(rest)
            if devices == 1 and kind != "collective-permute":
                continue
            shapes = _shapes(result)
            if start and kind == "all-gather":  # operands, then results
                shapes = shapes[len(shapes) // 2 :]
            elif start and kind == "collective-permute":  # operand, result, contexts
                shapes = shapes[1:2]
            path = _NAME.search(line)
            if scattered and kind == "all-reduce":
                kind = "reduce-scatter"
                shapes = [(d, (math.prod(s) // devices,)) for d, s in shapes]
            one = Collective(kind, tuple(shapes), devices, path[1] if path else "", *runs[name])
            # One that runs beside other work is written in each fusion that it goes through, and
            # those of `jax.shard_map` have all the same channel: they stand in one computation.
            channel = _CHANNEL.search(rest)
            key = (channel[1], one.kind, one.shapes) if channel else (name, len(found))
            here[key] += 1
            found.setdefault((*key, here[key]), one)
    return list(found.values())


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name, lines = ("ENTRY " if line.startswith("ENTRY") else "") + head[1], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _runs(bodies: dict[str, list[str]]) -> dict[str, tuple[int, int]]:
    """In how many loops each computation is, and how often a run of the program runs it at most."""
    found: dict[str, tuple[int, int]] = {}

    def visit(key: str, loops: int, times: int) -> None:
        if key not in bodies:
            return
        before = found.get(key, (0, 0))
        found[key] = max(loops, before[0]), times + before[1]
        for line in bodies[key]:
            is_loop = " while(" in line
            each = _trips(line, bodies) if is_loop else 1
            called = _CALLED.findall(line)
            for several, one in _BRANCHES.findall(line):
                called += [x.strip().lstrip("%") for x in several.split(",")] if several else [one]
            for other in called:
                visit(other, loops + is_loop, times * each)

    visit(next(name for name in bodies if name.startswith("ENTRY ")), 0, 1)
    return found


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Of a loop, as the compiler knows them, or else what its counter is compared with; else 1."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    limits = [
        int(x) for each in lines for x in re.findall(r" [su]32\[\]\S* constant\((\d+)\)", each)
    ]
    return limits[0] if len(limits) == 1 else 1


def _shapes(result: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(x) for x in dims.split(",") if x))
        for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result))
    ]


def _devices(rest: str) -> int:
    """Devices of a group, of the three ways that XLA writes groups in."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):  # [2,4]<=[8]
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest
    ):  # mesh['a'=8] {'a'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1
