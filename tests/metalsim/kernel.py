"""Kernel, in the place of what mx.fast.metal_kernel returns, and metal(), which puts it there."""

import contextlib
import importlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import mlx.core as mx
import numpy as np

from . import text
from .build import compile_kernel
from .fault import Fault
from .lint import lint
from .runner import Buffer, Counters, Program

_metal_kernel = mx.fast.metal_kernel
_programs = {}

_NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,  # its bits
    mx.complex64: np.complex64,
}


class Simulation:
    """How kernels run, and what all of them did together."""

    def __init__(self, checked=True, seed=0, strict=False):
        self.checked = checked
        self.seed = seed
        self.strict = strict
        self.counters = Counters()


_current = [Simulation()]


class Kernel:
    """A Metal kernel that runs in the simulator; the arguments are mx.fast.metal_kernel's.

    Calling it takes what the result of mx.fast.metal_kernel takes and returns a list of arrays.
    Outside metal() it runs checked. Raises Fault, and ValueError as MLX does for wrong arguments.
    """

    def __init__(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
    ):
        options = {} if compile_options is None else {"compile_options": compile_options}
        self.kernel = _metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            **options,
        )
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.counters = Counters()

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ):
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        program = self._program(
            arrays, template or [], output_shapes, output_dtypes, grid, threadgroup, verbose
        )
        simulation = _current[-1]
        buffers = {}
        names = {a.name for a in program.kernel.arguments}
        for name, x in zip(self.input_names, arrays):
            buffers |= self._input(name, x, f"{name}_strides" in names)
        outputs = []
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes):
            outputs.append(_output(name, shape, dtype, init_value))
            buffers[name] = outputs[-1]
        order = [a for a in program.kernel.arguments if a.buffer is not None]
        for a in order:
            buffers[a.name].constant = "constant" in a.type.split()
        counters = program.run(
            [buffers[a.name] for a in order],
            grid,
            threadgroup,
            seed=simulation.seed,
            strict=simulation.strict,
        )
        self.counters.add(counters)
        simulation.counters.add(counters)
        return [
            mx.array(b.data).view(d) if d == mx.bfloat16 else mx.array(b.data)
            for b, d in zip(outputs, output_dtypes)
        ]

    def _program(self, arrays, template, shapes, dtypes, grid, threadgroup, verbose):
        """The compiled kernel for these types and shapes."""
        checked = _current[-1].checked
        signature = [(str(x.dtype), tuple(x.shape)) for x in arrays]
        key = repr(
            (self.name, self.source, self.header, signature, template, shapes, dtypes, checked)
        )
        if key not in _programs:
            like = [mx.zeros(x.shape, x.dtype) for x in arrays]

            def call(*inputs):
                return self.kernel(
                    inputs=list(inputs),
                    template=template,
                    grid=grid,
                    threadgroup=threadgroup,
                    output_shapes=shapes,
                    output_dtypes=dtypes,
                )

            kernel = text.export(call, like)
            if verbose:
                print(kernel.source)
            place = self._places(kernel)
            try:
                with ThreadPoolExecutor() as pool:
                    looked_at = pool.submit(lint, kernel) if checked else None
                    path = compile_kernel(kernel, checked)
                if looked_at:
                    looked_at.result()
            except Fault as fault:
                where = fault.place
                raise Fault(
                    fault.kind, place(where) if isinstance(where, int) else self.name, fault.text
                ) from None
            _programs[key] = Program(self.name, kernel, path, checked, place)
        return _programs[key]

    def _places(self, kernel):
        """Names a line of the generated text by the string given to Kernel that it came from."""
        body = kernel.source.rindex(self.source) if self.source in kernel.source else 0
        first = kernel.source.count("\n", 0, body) + 1
        in_header = self.header.count("\n")

        def place(line):
            if first <= line <= first + self.source.count("\n"):
                part = f"body:{line - first + 1}"
            elif line <= in_header + 1:
                part = f"header:{line}"
            else:
                part = f"generated:{line}"
            return f"{self.name}:{part} `{kernel.line(line)}`"

        return place

    def _input(self, name, x, strided):
        given = _to_numpy(x)
        data = np.ascontiguousarray(given)
        mask = None
        if strided and not self.ensure_row_contiguous:
            apart = given.ndim > 0 and given.shape[-1] > 1 and given.strides[-1] != given.itemsize
            data, strides, mask = _spread(data, 2 if apart else 1)
        else:
            strides = [s // data.itemsize for s in data.strides]
        return {
            name: Buffer(name, data, mask=mask),
            f"{name}_shape": Buffer(f"{name}_shape", np.array(x.shape, np.int32)),
            f"{name}_strides": Buffer(f"{name}_strides", np.array(strides, np.int64)),
            f"{name}_ndim": Buffer(f"{name}_ndim", np.array(x.ndim, np.int32)),
        }


def _to_numpy(x):
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _spread(data, step):
    """(flat copy, strides, mask) of an array with gaps between rows, planes and so on.

    A kernel that reads an input's strides must live with any, so that is what it gets; only the
    last axis has the one of ``step``, as kernels may ask whether its elements lie side by side.
    The gaps hold NaN and no element.
    """
    shape = list(data.shape)
    # Rows stay aligned to 16 bytes, as those of a slice of heads are.
    last = [step * n + 32 // data.itemsize for n in shape[-1:]]
    spread = [*(n + 1 for n in shape[:-1]), *last]
    spread[:1] = shape[:1] if data.ndim > 1 else last
    inside = (*map(slice, shape[:-1]), *(slice(0, step * n, step) for n in shape[-1:]))
    mask = np.zeros(spread, np.uint8)
    mask[inside] = 1
    out = np.empty(spread, data.dtype)
    out.reshape(-1).view(np.uint8)[...] = 0xFF
    out[inside] = data
    strides = [s // data.itemsize for s in out[inside].strides]
    return out.reshape(-1), strides, mask.reshape(-1)


def _output(name, shape, dtype, init_value):
    data = np.empty(shape, _NUMPY[dtype])
    if init_value is None:
        # What a kernel leaves out shows as NaN.
        data.reshape(-1).view(np.uint8)[...] = 0xFF
    else:
        filled = mx.full(shape, init_value, dtype)
        data[...] = _to_numpy(filled)
    return Buffer(name, data, writable=True, initialised=init_value is not None)


@contextlib.contextmanager
def metal(checked=True, seed=0, strict=False):
    """Run the kernels that code inside builds with mx.fast.metal_kernel in the simulator.

    checked finds the faults that docs/simulator.md lists; without it kernels only compute and
    count. strict lets only simdgroup_barrier order the lanes of a SIMD-group. Yields the
    Simulation, whose `counters` are the totals of all kernels run inside.
    """
    simulation = Simulation(checked, seed, strict)
    _current.append(simulation)
    with contextlib.ExitStack() as stack:
        stack.callback(_current.pop)
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", Kernel))
        if importlib.util.find_spec("mlx_hydra.kernels"):
            kernels = importlib.import_module("mlx_hydra.kernels")
            stack.enter_context(mock.patch.object(kernels, "gpu_backend", lambda: "metal"))
            stack.callback(kernels.cache_clear)
            kernels.cache_clear()
        yield simulation
