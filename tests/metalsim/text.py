"""The text of a kernel: taken out of an exported function, made C++, and read for what it says."""

import os
import re
import struct
import tempfile
from dataclasses import dataclass

import mlx.core as mx

FILE = "kernel.metal"

_LITERAL = r"(?<![\w.])(\d+\.\d*|\.\d+|\d+(?=[eEhb]))([eE][+-]?\d+)?(\w*)"


@dataclass(frozen=True)
class Argument:
    type: str
    name: str
    buffer: int | None  # its [[buffer(n)]], or None for an attribute such as a thread's position


@dataclass(frozen=True)
class KernelText:
    """One generated kernel: its name, all its lines, and how to call it."""

    name: str
    source: str
    arguments: tuple
    instance: str

    def line(self, n):
        lines = self.source.split("\n")
        return lines[n - 1].strip() if 0 < n <= len(lines) else ""


def export(call, inputs):
    """The text that MLX generates for the one metal_kernel that `call(*inputs)` launches."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.mlxfn")
        mx.export_function(file, call, *inputs)
        with open(file, "rb") as f:
            data = f.read()
    at = data.rindex(b"\x0c\0\0\0\0\0\0\0CustomKernel") + 20
    parts = []
    for _ in range(2):
        (size,) = struct.unpack_from("<Q", data, at)
        parts.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return parse(*parts)


def parse(name, source):
    """KernelText of `source`, which defines the kernel function `name`."""
    found = re.search(
        r"\[\[kernel\]\] void " + re.escape(name) + r"\((.*?)\)\s*\{", source, re.DOTALL
    )
    if not found:
        raise ValueError(f"no kernel function {name} in the generated text")
    arguments = []
    for part in found.group(1).split(",\n"):
        match = re.fullmatch(r"\s*(.*?)\s*(\w+)\s*\[\[(\w+)(?:\((\d+)\))?\]\]\s*", part, re.DOTALL)
        buffer = int(match.group(4)) if match.group(3) == "buffer" else None
        arguments.append(Argument(match.group(1), match.group(2), buffer))
    instance = re.search(
        r"^template \[\[host_name\(.*\)\]\] \[\[kernel\]\] decltype\(.*\) (.*);$",
        source,
        re.MULTILINE,
    )
    return KernelText(name, source, tuple(arguments), instance.group(1) if instance else name)


def without_comments(source):
    """The text with comments and string literals blanked, its lines kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.DOTALL)


def to_cpp(kernel):
    """C++ with the kernel's own lines, which calls it as metalsim_kernel."""
    source = re.sub(r"^template \[\[host_name\(.*$", "", kernel.source, flags=re.MULTILINE)
    code = without_comments(source)
    edits = [
        (m.start(), m.end(), "METALSIM_SHARED")
        for m in re.finditer(r"\bthreadgroup\b", code)
        if re.match(r"[^;\[=(),*&{}]*[;\[]", code[m.end() :])
    ]
    edits += [(m.start(), m.end(), "") for m in re.finditer(r"\[\[\s*\w[^\[\]]*\]\]", code)]
    edits += [
        (m.start(), m.end(), f"metalsim_make<{m.group(1)}>")
        for m in re.finditer(r"\bvec\s*<([^<>;]+)>\s*(?=\()", code)
    ]
    # A literal without suffix is a float; those of half and bfloat get ones that C++ can define.
    suffixes = {"": "f", "h": "_metalsim_h", "bf": "_metalsim_bf"}
    edits += [
        (m.start(3), m.end(3), suffixes[m.group(3)])
        for m in re.finditer(_LITERAL, code)
        if m.group(3) in suffixes
    ]
    for start, end, new in sorted(edits, reverse=True):
        source = source[:start] + new + source[end:]
    values = []
    for a in kernel.arguments:
        if a.buffer is None:
            values.append(_attribute(a))
        elif a.type.endswith("&"):
            values.append(f"*({a.type[:-1]}*)buffers[{a.buffer}]")
        else:
            values.append(f"({a.type})buffers[{a.buffer}]")
    return "\n".join(
        [
            "#include <metal_stdlib>",
            '#include "mlx/backend/metal/kernels/utils.h"',
            f'#line 1 "{FILE}"',
            source,
            '#line 1 "entry"',
            '__attribute__((no_sanitize("all")))',
            'extern "C" void metalsim_kernel(void* const* buffers, const metalsim::Ids& ids) {',
            f"  {kernel.instance}({', '.join(values)});",
            "}",
            "",
        ]
    )


def _attribute(argument):
    name = argument.name
    if name == "threads_per_simdgroup" or name == "thread_execution_width":
        return "32u"
    if argument.type.endswith("3"):
        return f"metalsim_make<uint, 3>(ids.{name}[0], ids.{name}[1], ids.{name}[2])"
    if argument.type.endswith("2"):
        return f"metalsim_make<uint, 2>(ids.{name}[0], ids.{name}[1])"
    return f"ids.{name}"
