"""Compiles a kernel's text and the runtime into one shared object, kept by the hash of both."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from .fault import Fault
from .text import FILE, to_cpp

HERE = Path(__file__).parent
SOURCES = ("shim.h", "simdgroup.h", "runtime.h", "runtime.cpp")

COMMON = [
    "--target=x86_64-linux-gnu",
    "-std=c++20",
    "-march=x86-64-v3",
    "-nostdinc",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-gline-tables-only",
    "-gdwarf-4",
    # half and bfloat are rounded after each operation.
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
]
# The thread sanitizer's calls at each load and store; the runtime answers them.
INSTRUMENT = [
    "-fsanitize=thread",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
]
FAST = ["-O2", "-w", *INSTRUMENT, "-DMETALSIM_ALIGNMENT=16"]
CHECKED = [
    "-O1",
    "-w",
    *INSTRUMENT,
    "-fsanitize=array-bounds,alignment,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",
    "-DMETALSIM_CHECKED",
    # One array to 64 KiB, so that what spills out of one lies in no other.
    "-DMETALSIM_ALIGNMENT=65536",
]


def zig():
    """Path of the compiler in the ziglang package, or None."""
    try:
        import ziglang
    except ImportError:
        return None
    return os.path.join(os.path.dirname(ziglang.__file__), "zig")


def available():
    """Whether kernels can run here: Linux on x86-64 with the ziglang package.

    Elsewhere tests of kernels skip; a Mac runs them on Metal itself.
    """
    return sys.platform == "linux" and platform.machine() == "x86_64" and zig() is not None


@functools.cache
def cache_folder():
    folder = os.environ.get("METALSIM_CACHE")
    folder = Path(folder or Path(tempfile.gettempdir()) / f"metalsim-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _fingerprint():
    if not available():
        raise RuntimeError("the simulator needs Linux on x86-64 and the ziglang package")
    digest = hashlib.sha256()
    for name in (*SOURCES, "build.py", "lint.py", "syntax.py", "text.py"):
        digest.update((HERE / name).read_bytes())
    digest.update(importlib.metadata.version("ziglang").encode())
    digest.update(mx.__version__.encode())
    return digest.hexdigest()


def keep(key, suffix, make):
    """The cached file of `key`, made by `make(path)` if it is not there yet."""
    digest = hashlib.sha256((_fingerprint() + key).encode()).hexdigest()[:32]
    path = cache_folder() / (digest + suffix)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = os.path.join(folder, "made" + suffix)
            make(made)
            os.replace(made, path)
    return path


@functools.cache
def include_folders():
    """Metal's standard headers, which lead to the shim, and MLX's own behind them."""
    root = cache_folder() / f"include-{_fingerprint()[:16]}"
    names = "stdlib math simdgroup simdgroup_matrix atomic compute common integer limits"
    files = {f"metal_{name}": '#include "shim.h"\n' for name in names.split()}
    # The shim covers bfloat mathematics; logging needs Metal's os_log.
    files["mlx/backend/metal/kernels/bf16_math.h"] = "#pragma once\n"
    files["mlx/backend/metal/kernels/logging.h"] = "#pragma once\n"
    # An argument declared as an array cannot name an address space in clang.
    utils = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/utils.h"
    files["mlx/backend/metal/kernels/utils.h"] = re.sub(
        r"(constant const int64_t) strides\[\d\]", r"\1* strides", utils.read_text()
    )
    files["mlx/backend/metal/kernels/complex.h"] = (
        "#pragma once\ntemplate <class T> struct complex_t { T real, imag; };\n"
        "typedef complex_t<float> complex64_t;\n"
    )
    if not root.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / "include"
            for name, content in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_text(content)
            # Another process may have been first; its files are the same.
            with contextlib.suppress(OSError):
                made.rename(root)
    return [f"-I{HERE}", f"-I{root}", f"-I{Path(mx.__file__).parent / 'include'}"]


def clang(*arguments):
    """Run clang; what it prints, or a Fault of kind "compile" at the first error."""
    done = subprocess.run([zig(), "clang", *COMMON, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise _compile_fault(done.stderr)
    return done.stdout


def _compile_fault(messages):
    found = re.search(r"^(.*?):(\d+):\d+: (?:fatal )?error: (.*)$", messages, re.MULTILINE)
    if not found:
        return Fault("compile", "", messages.strip()[-2000:] or "clang failed")
    file, line, text = found.groups()
    # An error inside the shim: the line of the kernel that led there is in a note.
    used = re.search(rf"^{re.escape(FILE)}:(\d+):", messages, re.MULTILINE)
    if os.path.basename(file) != FILE and used:
        return Fault("compile", int(used.group(1)), f"{text} (in {os.path.basename(file)})")
    return Fault("compile", int(line) if file == FILE else f"{file}:{line}", text)


def _runtime():
    def make(path):
        clang("-O3", "-w", "-c", str(HERE / "runtime.cpp"), "-o", path)

    return keep("runtime", ".o", make)


def _fence():
    """An object that keeps the bytes beside the threadgroup arrays free of anything else."""

    def make(path):
        source = path + ".cpp"
        section = '__attribute__((section("metalsim_shared"), used))'
        Path(source).write_text(f"static {section} char metalsim_fence[65536];\n")
        clang("-c", source, "-o", path)

    return str(keep("fence", ".o", make))


def compile_kernel(kernel, checked):
    """Path of the shared object that runs `kernel`, a KernelText."""
    text = to_cpp(kernel)
    flags = CHECKED if checked else FAST

    def make(path):
        folder = os.path.dirname(path)
        source, built = os.path.join(folder, "kernel.cpp"), os.path.join(folder, "kernel.o")
        Path(source).write_text(text)
        clang(*flags, *include_folders(), "-c", source, "-o", built)
        objects = [_fence(), built, _fence()] if checked else [built]
        link = [zig(), "ld.lld", "-shared", "-z", "now", *objects, str(_runtime()), "-o", path]
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode:
            raise Fault("compile", "", done.stderr.strip()[-2000:])

    return keep(" ".join(flags) + text, ".so", make)
