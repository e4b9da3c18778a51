"""What a kernel does per tile, read from its machine code: SASS (`nvdisasm -c`) or amdgcn text.

The code is a graph with one node per instruction. A loop is what lies on the ways from its header back to its header,
without the loops inside it: on sm_100 those are waits for barriers, which turn zero or more times. The *inner loop* is
the innermost one with matrix instructions, or with exponentials where fp32 is multiplied without any. Attention kernels
have two, for full and for partial tiles. The steady state is that of the full ones, and its loop is the one with fewer
instructions per matrix instruction: both do the same, and the other one compares positions besides. Triton does not
unroll these loops: one iteration is one tile (`matrix_flops` checks it where the instruction names its shape).

A kernel without such a loop moves one tile per program: its work is the longest way through it.

Every instruction counts as executed by all warps, also where a branch leaves it to one of them (on sm_100 the matrix
instructions and what feeds them).

Worked example: in

    .L_x_2:                                      HMMA belongs to the loop from .L_x_2 to the BRA: 2 other, 1 mma.
            HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
            ISETP.GE.AND P0, PT, R3, R5, PT ;
        @P0 BRA `(.L_x_2) ;
            EXIT ;
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CLASSES = ("mma", "exp", "float", "integer", "memory", "other")

# The first pattern that an instruction begins with says its class. "exp" is all that runs on the unit of special
# functions, nearly all of it exponentials; moves and selects are "integer"; shuffles go through shared memory.
_SASS = {
    "mma": r"[HIDQ]G?MMA\b|UTC\w*MMA",
    "exp": r"MUFU",
    "other": r"UTC|LDGDEPBAR|LDC|ULDC|FENCE|ISBERD",
    "memory": r"LD|ST|ATOM|RED\b|UTMA|UBLK|SHFL|CCTL",
    "float": r"F(ADD|MUL|FMA|MNMX|SEL|SET|2F|CHK|SWZ)|H(ADD|MUL|FMA|MNMX|SET)|I2F|F2I",
    "integer": r"I|U|V|LEA|LOP|SHF|PRMT|SEL|MOV|P2R|R2|PLOP|CS2R|S2|SGXT|BMSK|FLO|POPC|BREV",
}
_AMDGCN = {
    "mma": r"v_(mfma|smfmac)",
    "exp": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "memory": r"(global|buffer|flat|scratch|ds)_|s_(buffer_)?(load|store)",
    "float": r"v_.*(f16|f32|f64|bf16)",
    "integer": r"v_",
}
_SASS_LINE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_AMDGCN_LINE = re.compile(r"\t([a-z][a-z_0-9]+)([^;]*)")
_LABEL = re.compile(r"(\.L_x_\d+|\.LBB\w+):")


@dataclass(frozen=True)
class Instruction:
    """`goes_on`: the next instruction may follow it. `jumps`: where it may go besides."""

    name: str
    goes_on: bool
    jumps: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What one warp executes for one tile."""

    names: Counter[str]  # instructions with all their modifiers
    is_loop: bool  # one iteration of the inner loop, not all of the kernel

    @property
    def classes(self) -> dict[str, int]:
        """Instructions of each of `CLASSES`."""
        found = dict.fromkeys(CLASSES, 0)
        for name, n in self.names.items():
            found[class_of(name)] += n
        return found

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread loads from global memory or stores there."""
        return sum(n * _global_bytes(name) for name, n in self.names.items())

    @property
    def matrix_flops(self) -> int | None:
        """Operations of the matrix instructions, of one warp; None without any, or where their names have no shape."""
        shapes = {name: _matrix_flops(name) for name in self.names if class_of(name) == "mma"}
        if not shapes or None in shapes.values():
            return None
        return sum(self.names[name] * flops for name, flops in shapes.items())


def work(text: str) -> Work:
    """What a warp executes per tile, from the listing of one kernel."""
    code = parse(text)
    loops = list(_innermost(code))
    for wanted in ("mma", "exp"):
        bodies = [(sum(class_of(code[i].name) == wanted for i in loop), loop) for loop in loops]
        bodies = [(n, loop) for n, loop in bodies if n]
        if bodies:
            _, loop = min(bodies, key=lambda body: len(body[1]) / body[0])
            return Work(Counter(code[i].name for i in loop), True)
    return Work(Counter(code[i].name for i in _longest_way(code)), False)


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing in order, with jumps as indices."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, bool, str]] = []  # name, whether it is conditional, operands
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif sass := _SASS_LINE.match(line):
            condition, name, operands = sass.groups()
            lines.append((name, bool(condition) or re.match(r"!?U?P\d", operands) is not None, operands))
        elif amdgcn := _AMDGCN_LINE.match(line):
            lines.append((amdgcn[1], amdgcn[1].startswith("s_cbranch"), amdgcn[2]))
    code = []
    for name, conditional, operands in lines:
        leaves = re.match(r"(BRA|CALL|JMP|BRX)\b|s_c?branch", name)  # ptxas also jumps by CALL.REL.NOINC
        target = re.search(r"\.L_x_\d+|\.LBB\w+", operands) if leaves else None
        ends = re.match(r"(EXIT|RET|KILL)\b|s_endpgm|s_setpc", name) is not None
        jumps = (labels[target[0]],) if target else ()
        code.append(Instruction(name, conditional or not (ends or jumps), jumps))
    return code


def class_of(name: str) -> str:
    """Which of `CLASSES` an instruction belongs to."""
    table = _AMDGCN if name[0].islower() else _SASS
    return next((kind for kind, pattern in table.items() if re.match(pattern, name)), "other")


def _next(code: Sequence[Instruction], i: int) -> Iterable[int]:
    if code[i].goes_on and i + 1 < len(code):
        yield i + 1
    yield from code[i].jumps


def _depth_first(code: Sequence[Instruction]) -> tuple[list[int], list[tuple[int, int]]]:
    """The instructions that can be reached, each after all that follow it, and the jumps back (from, to)."""
    done, back = [], []
    state = {0: "open"}
    stack = [(0, iter(_next(code, 0)))]
    while stack:
        i, following = stack[-1]
        j = next(following, None)
        if j is None:
            stack.pop()
            state[i] = "done"
            done.append(i)
        elif state.get(j) == "open":
            back.append((i, j))
        elif j not in state:
            state[j] = "open"
            stack.append((j, iter(_next(code, j))))
    return done, back


def _innermost(code: Sequence[Instruction]) -> Iterable[set[int]]:
    """Each loop, without the loops inside it."""
    reached, back = _depth_first(code)
    before: dict[int, list[int]] = {}
    for i in reached:
        for j in _next(code, i):
            before.setdefault(j, []).append(i)
    loops: dict[int, set[int]] = {}
    for latch, header in back:
        body, todo = loops.setdefault(header, {header}), [latch]
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += before.get(i, [])
    for body in loops.values():
        yield body.difference(*(inner for inner in loops.values() if inner < body))


def _longest_way(code: Sequence[Instruction]) -> list[int]:
    """The most instructions on a way from the first to an end, with every loop taken once."""
    reached, back = _depth_first(code)
    length: dict[int, int] = {}
    after: dict[int, int | None] = {}
    for i in reached:  # all that follow come before
        ways = [j for j in _next(code, i) if (i, j) not in back]
        after[i] = max(ways, key=lambda j: length[j], default=None)
        length[i] = 1 + (0 if after[i] is None else length[after[i]])
    way, i = [], 0
    while i is not None:
        way.append(i)
        i = after[i]
    return way


def _global_bytes(name: str) -> int:
    if re.match(r"(LDG|STG)\b", name):
        width = re.search(r"\.(128|64|U?S?16|U?S?8)\b", name)
        return int(re.sub(r"\D", "", width[1])) // 8 if width else 4
    if match := re.match(r"(?:global|buffer)_(?:load|store)_(?:dword(?:x(\d))?|(ubyte|sbyte|byte)|(?:.*short))", name):
        return 1 if match[2] else 4 * int(match[1] or 1) if "dword" in name else 2
    return 0


def _matrix_flops(name: str) -> int | None:
    """Operations of one matrix instruction as seen by one warp: a group of 4 warps shares an HGMMA."""
    if match := re.match(r"HMMA\.(16)(8)(8|16|32)\b|HGMMA\.(\d+)x(\d+)x(\d+)|v_mfma_f32_(\d+)x(\d+)x(\d+)", name):
        m, n, k = (int(x) for x in match.groups() if x)
        return 2 * m * n * k // (4 if name.startswith("HGMMA") else 1)
    return None
