"""Runs a compiled kernel on NumPy arrays in the host process and turns its report into a Fault."""

import atexit
import json
import math
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, fields

import numpy as np

from .elf import Elf
from .fault import Fault
from .text import FILE

PAGE = 4096
TIMEOUT_S = 300
THREADGROUP_BYTES = 32 * 1024
MAX_THREADS = 1024


@dataclass
class Counters:
    """Totals over dispatches; bytes are those that threads asked for, before any cache."""

    device_bytes_read: int = 0
    device_bytes_written: int = 0
    matrix_products: int = 0  # 8x8x8, one a SIMD-group
    barriers: int = 0  # threadgroup barriers, one a threadgroup
    simdgroup_barriers: int = 0  # one a SIMD-group
    collectives: int = 0  # of SIMD-groups, barriers and products included
    dispatches: int = 0

    def add(self, other):
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


# In the order of enum Fault in runtime.cpp.
KINDS = (
    None,
    "out-of-bounds",
    "race",
    "unwritten",
    "read-only",
    "divergent-barrier",
    "divergent-collective",
    "inactive-lane",
    "array-index",
    "misaligned",
    "overflow",
    "divide-by-zero",
)
MANY = 0xFFFFFFFF
_REPORT = struct.Struct("<15Q64s64s64s6Q")


@dataclass
class Report:
    fault: int
    space: int
    index: int
    offset: int
    bytes: int
    write: int
    pc: int
    other_pc: int
    thread: int
    other_thread: int
    group: int
    other_write: int
    line: int
    other_line: int
    count: int
    file: str
    name: str
    other_name: str
    counters: Counters


def _read_report(data):
    values = [
        v.split(b"\0")[0].decode() if isinstance(v, bytes) else v for v in _REPORT.unpack(data)
    ]
    return Report(*values[:18], Counters(*values[18:], 0))


class _Host:
    """The host process, started when first needed and again if it has died."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def run(self, request):
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                path = os.path.join(os.path.dirname(__file__), "host.py")
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                atexit.register(self.process.stdin.close)
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("the process that runs kernels has died")
            return json.loads(line)


_host = _Host()


@dataclass
class Buffer:
    """One buffer of a dispatch; `data` is written back in place if the kernel may write it."""

    name: str
    data: np.ndarray
    writable: bool = False
    initialised: bool = True
    constant: bool = False
    mask: np.ndarray | None = None  # one byte an element: 0 where there is none


class Program:
    """A compiled kernel with what its ELF file tells."""

    def __init__(self, name, kernel, path, checked, place):
        self.name = name
        self.kernel = kernel
        self.path = str(path)
        self.checked = checked
        self.place = place
        self.elf = Elf(path)
        self.arrays = self.elf.shared_arrays()
        self.anchor = self.elf.address_of("metalsim_anchor")

    def run(self, buffers, grid, threads, seed=0, strict=False):
        """Run the grid, in threads as dispatchThreads counts them; Counters, or a Fault."""
        grid, threads = [int(x) for x in grid], [int(x) for x in threads]
        threads = [min(t, g) for t, g in zip(threads, grid)]
        name = self.name
        if min(grid) < 1 or min(threads) < 1:
            raise Fault("threads", name, f"grid {grid} of threadgroups {threads}: a size below 1")
        if math.prod(threads) > MAX_THREADS:
            raise Fault(
                "threads", name, f"threadgroup {threads} has {math.prod(threads)} threads of 1024"
            )
        used = sum(a.size for a in self.arrays)
        if used > THREADGROUP_BYTES:
            sizes = ", ".join(f"{a.name} {a.size}" for a in self.arrays)
            raise Fault(
                "threadgroup-memory",
                name,
                f"{used} bytes of threadgroup memory, 32768 are there: {sizes}",
            )
        groups = math.prod(-(-g // t) for g, t in zip(grid, threads))
        workers = 1 if self.checked else min(len(os.sched_getaffinity(0)), groups, 8)
        with tempfile.NamedTemporaryFile(prefix="metalsim", dir=_memory_folder()) as file:
            offsets, masks, end = [], [], workers * PAGE
            for b in buffers:
                offsets.append(end)
                end += -(-b.data.nbytes // PAGE) * PAGE
                masks.append(end)
                end += 0 if b.mask is None else -(-b.mask.nbytes // PAGE) * PAGE
            os.ftruncate(file.fileno(), end)
            with mmap.mmap(file.fileno(), end) as memory:
                for b, at, mask in zip(buffers, offsets, masks):
                    _view(memory, at, b.data)[...] = b.data
                    if b.mask is not None:
                        _view(memory, mask, b.mask)[...] = b.mask
                request = {
                    "library": self.path,
                    "anchor": self.anchor,
                    "image": self.elf.image_size(),
                    "data": file.name,
                    "arrays": [[a.address, a.size] for a in self.arrays],
                    "buffers": [_describe(*each) for each in zip(buffers, offsets, masks)],
                    "grid": grid,
                    "threads": threads,
                    "checked": int(self.checked),
                    "strict": int(strict),
                    "seed": _mix(seed) if self.checked else 0,
                    "workers": workers,
                    "timeout": TIMEOUT_S,
                }
                status = _host.run(request)
                reports = [
                    _read_report(memory[i * PAGE : i * PAGE + _REPORT.size]) for i in range(workers)
                ]
                for report in reports:
                    if report.fault:
                        raise self._fault(report, buffers)
                for code in status:
                    if code:
                        raise self._crash(code)
                for b, at in zip(buffers, offsets):
                    if b.writable:
                        b.data[...] = _view(memory, at, b.data)
        total = Counters(dispatches=1)
        for report in reports:
            total.add(report.counters)
        return total

    def _crash(self, code):
        name = self.name
        if code == -signal.SIGALRM:
            return Fault("timeout", name, f"the kernel still ran after {TIMEOUT_S} s")
        if code < 0:
            how = signal.Signals(-code).name
            hint = "" if self.checked else "; run it checked to see where"
            return Fault("crash", name, f"the kernel ended with {how}{hint}")
        return RuntimeError(f"the kernel's process ended with {code}")

    def _at(self, pc):
        found = self.elf.line_of(pc) if pc else None
        return self.place(found[1]) if found and found[0] == FILE else self.name

    def _fault(self, r, buffers):
        kind = KINDS[r.fault]
        who = f"thread {r.thread} of threadgroup {r.group}"
        if kind in ("divergent-barrier", "divergent-collective", "inactive-lane"):
            place = self.place(r.line) if r.file == FILE else f"{r.file}:{r.line}"
            return Fault(kind, place, _collective_text(kind, r, self.place))
        if kind in ("array-index", "misaligned", "overflow", "divide-by-zero"):
            place = self.place(r.line) if r.file == FILE else f"{r.file}:{r.line}"
            what = {
                "array-index": f"index {_signed(r.offset)} is outside the array",
                "misaligned": f"address {r.offset:#x} is not aligned for the type read or written",
                "overflow": "signed integer overflow",
                "divide-by-zero": "integer division by zero",
            }[kind]
            return Fault(kind, place, f"{what}, {who}")
        where, size = self._where(r, buffers)
        verb = "writes" if r.write else "reads"
        place = self._at(r.pc)
        if kind == "race":
            other = "many" if r.other_thread == MANY else str(_thread(r.other_thread))
            verb2 = "written" if r.other_write else "read"
            group = " of another threadgroup" if r.count else ""
            text = (
                f"{who} {verb} {where}, {verb2} by thread {other}{group} at {self._at(r.other_pc)}"
                " with no barrier between that orders them"
            )
        elif kind == "unwritten":
            text = f"{who} reads {where}, which nothing has written"
        elif kind == "read-only":
            text = f"{who} writes {where}, an input"
        elif r.space == 0 and buffers[r.index].mask is not None and not r.count:
            text = f"{who} {verb} {r.bytes} bytes between the rows of {where}: look at its strides"
        else:
            text = f"{who} {verb} {r.bytes} bytes at {where}, which has {size}"
        return Fault(kind, place, text)

    def _where(self, r, buffers):
        at = _signed(r.offset)
        if r.space == 0:
            b = buffers[r.index]
            item = b.data.itemsize
            label = f"{b.name}[{at // item}]" if at % item == 0 else f"{b.name} + {at} bytes"
            return label, f"{b.data.size} elements"
        if r.space == 1:
            a = self.arrays[r.index]
            return f"threadgroup {a.name} + {at} bytes", f"{a.size} bytes"
        if r.space == 2:
            return "the stack of another thread", "none of this thread's 256 KiB"
        return f"address {r.offset:#x}", "no buffer or array there"


def _collective_text(kind, r, place):
    if kind == "inactive-lane":
        return f"{r.name} in lane {r.thread} takes from lane {_signed32(r.count)}, inactive"
    if kind == "divergent-barrier":
        if r.other_line:
            return (
                f"{r.name}: thread {r.thread} waits here, thread {r.other_thread} of the same "
                f"threadgroup at {place(r.other_line)}"
            )
        return f"{r.name}: {r.count} threads of the threadgroup have left the kernel"
    if r.other_line:
        return (
            f"{r.name} reached by {r.count} lanes, while thread {r.other_thread} of the same "
            f"SIMD-group waits in {r.other_name} at {place(r.other_line)}"
        )
    return f"{r.name} reached by {r.count} lanes only, it takes the whole SIMD-group"


def _thread(n):
    return f"of SIMD-group {n - 1024} as a whole" if n >= 1024 else n


def _signed(n):
    return n - (1 << 64) if n >> 63 else n


def _signed32(n):
    return n - (1 << 32) if n >> 31 else n


def _mix(seed):
    return (seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % (1 << 62) | 1


def _memory_folder():
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _view(memory, at, like):
    return np.frombuffer(memory, like.dtype, like.size, at).reshape(like.shape)


def _describe(b, at, mask):
    return {
        "offset": at,
        "mask_offset": mask,
        "mask_bytes": 0 if b.mask is None else b.mask.nbytes,
        "bytes": b.data.nbytes,
        "writable": int(b.writable),
        "initialised": int(b.initialised),
        "granule": b.data.itemsize,
        "counted": int(not b.constant),
    }
