"""Faults that show in a kernel's text without running it."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .build import CHECKED, clang, include_folders, keep
from .fault import Fault
from .syntax import nodes
from .text import FILE, to_cpp

_SCALARS = ["bool", "half", "bfloat", "float", "size_t", "void", "float16_t", "bfloat16_t"]
for _size in ("char", "short", "int", "long"):
    _SCALARS += [_size, "u" + _size]
for _bits in (8, 16, 32, 64):
    _SCALARS += [f"int{_bits}_t", f"uint{_bits}_t"]


def lint(kernel):
    """Raises Fault for what Metal would not take in `kernel`, a KernelText that compiles as C++.

    Looks for double, lambdas, recursion, implicit conversions to or from bfloat, pointers and
    references without an address space, and address spaces that change on the way.
    """
    text = to_cpp(kernel)

    def make(path):
        folder = os.path.dirname(path)
        _words(kernel.source, folder)
        source = os.path.join(folder, "kernel.cpp")
        Path(source).write_text(text)
        common = ["-w", "-fsyntax-only", *include_folders(), source]
        with ThreadPoolExecutor() as pool:
            spaces = pool.submit(clang, "-DMETALSIM_ADDRESS_SPACES", *common)
            _tree(clang("-DMETALSIM_ALIGNMENT=16", "-Xclang", "-ast-dump", *common))
        try:
            spaces.result()
        except Fault as fault:
            raise Fault("address-space", fault.place, fault.text) from None
        Path(path).touch()

    keep("lint" + " ".join(CHECKED) + text, ".ok", make)


def _words(source, folder):
    code, lines = _preprocessed(source, folder)

    def line(position):
        return lines[code.count("\n", 0, position)]

    for match in re.finditer(r"\bdouble\b", code):
        raise Fault("double", line(match.start()), "Metal has no double; use float")
    for position, found in _bare_pointers(code):
        raise Fault(
            "address-space",
            line(position),
            f"`{found}` names no address space: device, constant, threadgroup or thread",
        )


def _preprocessed(source, folder):
    """The kernel's own text with its macros expanded, and the line each of its lines was."""
    source = re.sub(r"^\s*#\s*include.*$", "", source, flags=re.MULTILINE)
    path = os.path.join(folder, "plain.cpp")
    Path(path).write_text(source)
    kept, lines, line = [], [], 1
    for text in clang("-E", "-w", "-D__METAL__", path).split("\n"):
        marker = re.match(r'# (\d+) "(.*?)"', text)
        if marker:
            line = int(marker.group(1))
            continue
        kept.append(text)
        lines.append(line)
        line += 1
    return "\n".join(kept), lines


def _bare_pointers(code):
    """Pointers and references declared without an address space: their position and words."""
    declared = re.findall(r"\b(?:typename|class|struct|using)\s+(\w+)", code)
    declared += re.findall(r"\btypedef\b[^;]*\b(\w+)\s*;", code)
    vectors = [f"{w}[234]" for w in _SCALARS]
    types = "|".join(sorted({*_SCALARS, *vectors, *declared}, key=len, reverse=True))
    start = r"(?P<start>^|[(,;{}<>]|\bMETAL_FUNC\b|\binline\b|\bstatic\b|\bconstexpr\b)"
    type_ = rf"(?:const\s+)?(?:metal::)?(?:{types})\b(?:\s*<[^<>;(){{}}]*>)?(?:\s+const)?"
    named = r"\s*[*&]+\s*(?:const\s+)?\w+\s*(?=[,)=;\[{:(])"
    after = rf"(?:\s*\(\s*[*&]\s*\w+\s*\)|{named}|\s*\*+\s*(?=[)>]))"
    for match in re.finditer(rf"{start}\s*(?P<what>{type_}{after})", code):
        yield match.start("what"), " ".join(match.group("what").split())


def _tree(dump):
    """Faults in clang's syntax tree of the kernel."""
    functions, first, calls, inside = {}, {}, [], []
    for node in nodes(dump, FILE):
        while inside and inside[-1][0] >= node.depth:
            inside.pop()
        if node.kind in ("FunctionDecl", "CXXMethodDecl"):
            first[node.address] = first.get(node.previous, node.address)
            inside.append((node.depth, first[node.address]))
            functions[first[node.address]] = node
        calls.extend((inside[-1][1], first.get(f, f)) for f in node.functions if inside)
        if node.file != FILE:
            continue
        if node.kind == "LambdaExpr":
            raise Fault("lambda", node.line, "Metal has no lambdas; write a function or a macro")
        converts = node.kind == "ImplicitCastExpr" and node.cast == "FloatingCast"
        if node.type == "__bf16" and (
            (converts and not node.explicit)
            or (node.kind == "CompoundAssignOperator" and node.computed != "__bf16")
        ):
            raise Fault(
                "conversion",
                node.line,
                "implicit conversion to bfloat, which Metal has not: write the cast",
            )
    _no_recursion(functions, calls)


def _no_recursion(functions, calls):
    graph = {}
    for caller, callee in calls:
        graph.setdefault(caller, set()).add(callee)
    for start, node in functions.items():
        if node.file != FILE:
            continue
        seen, todo = set(), list(graph.get(start, ()))
        while todo:
            at = todo.pop()
            if at == start:
                raise Fault("recursion", node.line, f"{node.name} calls itself")
            if at not in seen:
                seen.add(at)
                todo.extend(graph.get(at, ()))
