"""The kernels of metal/: their text, and the calls that run it on Apple's GPUs and on NVIDIA's."""

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import mlx.core as mx

# `threadgroup float name[64];` and no pointer or argument.
_THREADGROUP_ARRAY = re.compile(r"\bthreadgroup(?=\s+[\w:<>]+\s+\w+\s*\[)")
_ADDRESS_SPACE = re.compile(r"\b(device|constant|threadgroup|thread)\s+")
# What MLX tells of an input, where its text mentions it.
_ABOUT = ("_shape", "_strides", "_ndim")
_SHAPES = re.compile(r"\b\w+_(?:shape|strides|ndim)\b")
_NOT_CODE = re.compile(r"^\s+|[ \t]*//.*$", re.MULTILINE)


def gpu_backend() -> Optional[str]:
    """Which kernels the default device can run: ``"metal"``, ``"cuda"``, or None."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() and _has_tensor_cores() else None


@functools.cache
def _has_tensor_cores() -> bool:
    """Of the kind that compat/cuda.h speaks to, with TF32 and bfloat16: from Ampere (8.0) on."""
    return int(mx.device_info().get("compute_capability_major", 8)) >= 8


@dataclass(frozen=True, eq=False)
class Kernel:
    """One file of metal/: the body of a kernel, and what MLX needs to build its signature.

    Args:
        name: the file's name without ``.metal``.
        inputs, outputs: the names of its buffers, in order.
        headers: files of metal/ that stand before it.
        contiguous: whether MLX copies inputs that are not row-contiguous. Else they come as they
            are, strided or not.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    contiguous: bool = False

    def __call__(
        self,
        backend: str,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple],
        groups: tuple[int, int, int],
        threads: tuple[int, int, int],
        output_shapes: Sequence[tuple],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run it on ``groups`` threadgroups of ``threads`` each; every group is whole.

        A kernel has all its inputs always. An array that stands in for some which it does not
        read goes to it once.
        """
        first = {}
        same = tuple(first.setdefault(id(x), i) for i, x in enumerate(inputs))
        given = [inputs[i] for i in first.values()]
        dtypes = tuple(x.dtype for x in given) if backend == "cuda" else ()
        return _build(self, backend, dtypes, same)(
            inputs=given,
            template=list(template),
            grid=tuple(g * t for g, t in zip(groups, threads)),
            threadgroup=threads,
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
        )


# MLX keeps arrays of up to 8 bytes in the host's memory on CUDA, and every threadgroup that reads
# one fetches it over the bus. Before so many others numbers lie in the GPU's own.
_OTHERS = (0,) * 4


@functools.lru_cache(maxsize=256)
def constant(values: tuple, dtype: mx.Dtype) -> mx.array:
    """A kernel's few numbers, in one array for all layers and steps.

    A new one would have to be brought over by page faults on CUDA, for every call. It waits for
    what the GPU is at: not for numbers that change from step to step.
    """
    array = (mx.array((*values, *_OTHERS), dtype) + 0)[: len(values)]
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=4)
def positions(offset: int, count: int) -> mx.array:
    """The same position for ``count`` sequences, and maybe more; int32."""
    return mx.array((offset,) * max(count, len(_OTHERS)), mx.int32)


def near(number: int) -> mx.array:
    """A number as int32 ``[1]`` for many kernels to read, and for functions that are compiled."""
    array = mx.array([number], mx.int32)
    return (array + constant(_OTHERS, mx.int32))[:1] if gpu_backend() == "cuda" else array


@functools.cache
def _build(
    kernel: Kernel, backend: str, dtypes: tuple[mx.Dtype, ...], same: tuple[int, ...]
) -> Callable:
    name, text = kernel.name, read_text(f"{kernel.name}.metal")
    others = stand_ins(kernel, text, same)
    if backend == "metal":
        make = mx.fast.metal_kernel
        header = "\n".join(map(read_text, kernel.headers))
        body = others + text
        if others:
            # MLX tells kernels apart by their names.
            name += f"_{int(hashlib.sha256(others.encode()).hexdigest()[:8], 16)}"
    else:
        make = mx.fast.cuda_kernel
        # The names of files tell their texts.
        header, body = cuda_text(kernel)
        body = others + body
        # MLX before 0.32.4 keeps compiled CUDA kernels, on disk too, by name and template alone.
        text = f"{header}{body}{dtypes}"
        name += f"_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return make(
        name=f"mlx_hydra_{name}",
        input_names=[n for i, n in enumerate(kernel.inputs) if same[i] == i],
        output_names=list(kernel.outputs),
        source=body,
        header=header,
        ensure_row_contiguous=kernel.contiguous,
    )


cache_clear = _build.cache_clear


def stand_ins(kernel: Kernel, text: str, same: Sequence[int]) -> str:
    """Declares inputs that are others: of each, which one it is, ``same[i] == i`` if itself."""
    lines = []
    for name, other in ((kernel.inputs[i], kernel.inputs[j]) for i, j in enumerate(same) if i != j):
        known = [part for part in ("", *_ABOUT) if not part or f"{name}{part}" in text]
        lines += [f"const auto {name}{part} = {other}{part};\n" for part in known]
    return "".join(lines)


def cuda_text(kernel: Kernel) -> tuple[str, str]:
    """A kernel's headers and its body as CUDA: lines that name files in the user's cache folder.

    MLX copies and hashes all text at every call. Where nothing can be written they are the text.
    """
    compat = ["compat/cuda.h"] + ["compat/tile.h"] * ("tile.h" in kernel.headers)
    header = as_cuda("\n".join(map(read_text, (*compat, *kernel.headers))))
    body = as_cuda(read_text(f"{kernel.name}.metal"))
    # MLX gives a kernel of its inputs' shapes and strides what its text mentions.
    mentioned = " ".join(sorted(set(_SHAPES.findall(body))))
    return _named(kernel.name, header), f"// {mentioned}\n{_named(kernel.name, body)}"


def _named(name: str, text: str) -> str:
    name += f"_{hashlib.sha256(text.encode()).hexdigest()[:12]}.h"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        file = cache.expanduser().absolute() / "mlx_hydra" / name
        if not file.is_file() or file.read_bytes() != text.encode():
            file.parent.mkdir(parents=True, exist_ok=True)
            _put_down(file, text)
        file.as_posix().encode()
    except (OSError, RuntimeError, UnicodeEncodeError):
        return text
    # What a line of C cannot say.
    return text if {*'"\n'} & {*file.as_posix()} else f'#include "{file.as_posix()}"\n'


def _put_down(file: Path, text: str) -> None:
    """Write a file, whole or not at all, whoever else writes it."""
    part, path = tempfile.mkstemp(dir=file.parent)
    try:
        with open(part, "wb") as stream:
            stream.write(text.encode())
        os.replace(path, file)
    except OSError:
        os.unlink(path)
        raise


def as_cuda(text: str) -> str:
    """A kernel's text with Metal's address spaces said in CUDA's words; see compat/cuda.h.

    Without comments and indentation, as of all text there is to be little.
    """
    text = _NOT_CODE.sub("", text)
    return _ADDRESS_SPACE.sub("", _THREADGROUP_ARRAY.sub("__shared__", text))


def folder() -> Path:
    """metal/, which lies in the package when installed and beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "metal"
    return inside if inside.is_dir() else package.parent / "metal"


def read_text(name: str) -> str:
    """A file of metal/."""
    return (folder() / name).read_text(encoding="utf-8")
