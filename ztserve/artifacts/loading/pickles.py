"""Pickles that no first bytes give away: protocols 0 and 1, or any behind a prologue.

A pickle is a program for a stack machine, run from its first byte on; harm is done at
the first call, whatever follows. So it is walked here as the machine would, with the
heights of its stack in place of values, up to the first opcode that calls something.
Text seldom gets further than a byte: most opcodes need what nobody pushed.
Source: CPython, Lib/pickletools.py (opcodes, their arguments and stack effects).
"""

import pickletools
import re
from collections.abc import Iterator

MAX_OPERATIONS = 1 << 16
"""Of a file that goes on for longer: nobody wrote that as text."""
_CALLS = frozenset({"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"})
_NAMES = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
_IMPORTABLE = re.compile(rb"[\w.-]{1,255}\Z")
_PIECE = 4096
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def calls_something(file: memoryview) -> bool:
    """Tell whether unpickling the file, or what follows a pickle in it, would call."""
    stack: list[object] = []
    named = False
    for count, opcode in enumerate(_operations(file)):
        named = named or opcode.name in _NAMES
        if not _apply(opcode, stack):
            return False  # the machine would stop here
        if (named and opcode.name in _CALLS) or count >= MAX_OPERATIONS:
            return True
        if opcode.name == "STOP":
            stack.clear()  # another may follow, as in torch's files of old
    return False


def _apply(opcode: pickletools.OpcodeInfo, stack: list[object]) -> bool:
    """Change the heights of the stack; tell whether it was high enough."""
    mark, before = pickletools.markobject, opcode.stack_before
    count = len(before)
    if mark in before or (opcode.name == "POP" and stack and stack[-1] is mark):
        while stack and stack[-1] is not mark:
            stack.pop()
        if not stack:
            return False
        stack.pop()
        count = before.index(mark) if mark in before else 0
    if len(stack) < count:
        return False
    del stack[len(stack) - count :]
    stack.extend(opcode.stack_after)
    return True


def _operations(file: memoryview) -> Iterator[pickletools.OpcodeInfo]:
    """Yield the opcodes from the first byte on, as long as there are such."""
    at = 0
    while at < len(file):
        opcode = _OPCODES.get(file[at])
        if opcode is None:
            return
        at = _behind(opcode, file, at + 1)
        if at > len(file):
            return
        yield opcode


def _behind(opcode: pickletools.OpcodeInfo, file: memoryview, at: int) -> int:
    """Return where an opcode's argument ends; behind the file where it does not."""
    nowhere = len(file) + 1
    if opcode.arg is None:
        return at
    if opcode.arg.n >= 0:
        return at + opcode.arg.n
    if opcode.arg.n in _LENGTHS:
        size = _LENGTHS[opcode.arg.n]
        return at + size + int.from_bytes(file[at : at + size], "little")
    if opcode.name not in {"GLOBAL", "INST"}:
        return _line(file, at)
    for _ in ("module", "name"):
        end = _line(file, at)
        if not _IMPORTABLE.match(bytes(file[at : min(end - 1, at + 256)])):
            return nowhere
        at = end
    return at


def _line(file: memoryview, at: int) -> int:
    """Return where the line ends, its newline included."""
    while at < len(file):
        found = bytes(file[at : at + _PIECE]).find(b"\n")
        if found >= 0:
            return at + found + 1
        at += _PIECE
    return len(file) + 1
