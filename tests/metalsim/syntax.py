"""Reads the syntax tree that clang prints with -ast-dump."""

import re
from dataclasses import dataclass

_NODE = re.compile(r"^([ |`-]*)(\w+) (0x[0-9a-f]+) (.*)$")
_LOCATION = re.compile(r"(<[\w -]+>|[^\s<>,:]+):(\d+)(?::(\d+))?")
_TYPE = re.compile(r"'([^']*)'(?::'([^']*)')?")
_FUNCTION = re.compile(r"\b(?:Function|CXXMethod) (0x[0-9a-f]+)|(?:->|\.)[\w~]+ (0x[0-9a-f]+)$")


@dataclass
class Node:
    depth: int
    kind: str
    address: str
    previous: str  # address of an earlier declaration of the same function
    file: str
    line: int
    name: str  # of a declaration
    type: str  # with typedefs looked through
    cast: str  # kind of a cast
    explicit: bool  # part of a cast that the text spells out
    computed: str  # type in which a compound assignment computes
    functions: list  # addresses of the functions it refers to


def nodes(dump, start):
    """The nodes of a dump in order, from the first that names the file `start` on.

    Locations in a dump leave out what has not changed.
    """
    at = dump.find(start)
    if at < 0:
        return
    file, line = "", 0
    for text in dump[dump.rfind("\n", 0, at) + 1 :].split("\n"):
        match = _NODE.match(text)
        if not match:
            continue
        indent, kind, address, rest = match.groups()
        previous = re.match(r"(?:parent 0x\w+ )?prev (0x\w+)", rest)
        where, rest = _split_range(rest)
        origin = None
        after = _LOCATION.match(rest)
        parts = list(_LOCATION.finditer(where)) + ([after] if after else [])
        for part in parts:
            head, first, _ = part.groups()
            if head == "line":
                line = int(first)
            elif head != "col":
                file, line = head.rsplit("/", 1)[-1], int(first)
            origin = origin or (file, line)
        if after:
            rest = rest[after.end() :].lstrip()
        types = _TYPE.search(rest)
        cast = re.search(r"<(\w+)(?: \(.*\))?>", rest)
        computed = re.search(r"ComputeResultTy='([^']*)'(?::'([^']*)')?", rest)
        words = rest[: types.start()].split() if types else rest.split()
        yield Node(
            depth=len(indent),
            kind=kind,
            address=address,
            previous=previous.group(1) if previous else "",
            file=(origin or (file, line))[0],
            line=(origin or (file, line))[1],
            name=words[-1] if words else "",
            type=(types.group(2) or types.group(1)) if types else "",
            cast=cast.group(1) if cast else "",
            explicit="part_of_explicit_cast" in rest,
            computed=(computed.group(2) or computed.group(1)) if computed else "",
            functions=[a or b for a, b in _FUNCTION.findall(rest)],
        )


def _split_range(rest):
    """What stands between the < > that give a node's range, and what follows them."""
    at = rest.find("<")
    if at < 0:
        return "", rest
    depth = 0
    for i in range(at, len(rest)):
        depth += {"<": 1, ">": -1}.get(rest[i], 0)
        if depth == 0:
            return rest[at + 1 : i], rest[i + 1 :].lstrip()
    return "", rest
