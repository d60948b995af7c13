import importlib
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hydra import kernels
from mlx_hydra.ops.gated_delta_step import Weights, gated_delta_step

TILE = """
threadgroup T left[16 * 24];
threadgroup T right[16 * 24];
const short lane = thread_index_in_simdgroup;
for (int i = lane; i < 256; i += 32) {
  left[i / 16 * 24 + i % 16] = a[i];
  right[i / 16 * 24 + i % 16] = b[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
tile<T> A;
right_tile<T> B;
tile<float> C;
clear(C);
if (LEFT_TRANSPOSED) {
  load_transposed(A, left, 24, lane);
} else {
  load(A, left, 24, lane);
}
if (RIGHT_TRANSPOSED) {
  load_transposed(B, right, 24, lane);
} else {
  load(B, right, 24, lane);
}
multiply_add(C, A, B);
for (short i = 0; i < 8; i++) {
  once[tile_row(lane, i) * 16 + tile_col(lane, i)] = C.e[i];
}
for (short part = 0; part < 2; part++) {
  const short i = 2 * part;
  const float x = metal::max(
      metal::max(C.e[i], C.e[i + 1]), metal::max(C.e[i + 4], C.e[i + 5]));
  const float largest = row_max(x);
  const float total = row_sum(C.e[i] + C.e[i + 1] + C.e[i + 4] + C.e[i + 5]);
  if (tile_col(lane, i) == 0) {
    rows[tile_row(lane, i)] = largest;
    rows[16 + tile_row(lane, i)] = total;
  }
}
// The product, rounded, times b once more.
A = as_operand<T>(C);
multiply_add(C, A, B);
simdgroup_barrier(mem_flags::mem_threadgroup);
threadgroup float result[16 * 18];
store(C, result, 18, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = lane; i < 256; i += 32) {
  twice[i] = result[i / 16 * 18 + i % 16];
}
"""


@pytest.fixture
def tile_kernel(monkeypatch):
    read_text = kernels.read_text
    monkeypatch.setattr(
        kernels, "read_text", lambda name: TILE if name == "tile.metal" else read_text(name)
    )
    return kernels.Kernel("tile", ("a", "b"), ("once", "rows", "twice"), ("tile.h",))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_products_of_tiles(kernel_backend, tile_kernel, dtype):
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal((16, 16))).astype(dtype) for _ in range(2))
    for left in (False, True):
        for right in (False, True):
            once, rows, twice = tile_kernel(
                kernel_backend,
                [a, b],
                template=[("T", dtype), ("LEFT_TRANSPOSED", left), ("RIGHT_TRANSPOSED", right)],
                groups=(1, 1, 1),
                threads=(32, 1, 1),
                output_shapes=[(16, 16), (2, 16), (16, 16)],
                output_dtypes=[mx.float32] * 3,
            )
            A, B = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (a, b))
            A, B = A.T if left else A, B.T if right else B
            product = A @ B
            # Sums of 16 products of numbers of a few units, in float32.
            assert np.abs(np.array(once) - product).max() < 1e-5
            assert np.abs(np.array(rows[0]) - product.max(1)).max() < 1e-5
            assert np.abs(np.array(rows[1]) - product.sum(1)).max() < 5e-5
            rounded = np.array(once.astype(dtype).astype(mx.float32)).astype(np.float64)
            assert np.abs(np.array(twice) - (product + rounded @ B)).max() < 1e-4


def test_address_spaces_are_said_in_cudas_words():
    text = """
    threadgroup T a[16 * 24];
    threadgroup float b [N];
    METAL_FUNC void f(thread tile<T>& t, const device T* x, threadgroup U* target, constant int* n);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint lane = thread_index_in_simdgroup;
    constant constexpr float EPS = 1e-6f;  // of the norm

    // Nothing of this is left.
      #pragma unroll
    """
    cuda = kernels.as_cuda(text)
    assert "__shared__ T a[16 * 24];" in cuda
    assert "__shared__ float b [N];" in cuda
    assert "f(tile<T>& t, const T* x, U* target, int* n);" in cuda
    assert "threadgroup_barrier(mem_flags::mem_threadgroup);" in cuda
    assert "thread_index_in_simdgroup" in cuda
    lines = cuda.split("\n")
    assert "constexpr float EPS = 1e-6f;" in lines and "#pragma unroll" in lines
    assert "//" not in cuda


def test_text_is_named_to_cuda_and_lies_in_the_cache(tmp_path, monkeypatch):
    kernel = kernels.Kernel("fuse_heads", (), (), ("heads.h", "tile.h"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    header, body = kernels.cuda_text(kernel)
    names, line = body.split("\n", 1)
    files = [Path(re.fullmatch('#include "(.*)"\n', x)[1]) for x in (header, line)]
    assert {*files} == {*(tmp_path / "of the user" / "mlx_hydra").iterdir()}
    texts = [file.read_text() for file in files]
    for name in ("compat/cuda.h", "compat/tile.h", "heads.h", "tile.h"):
        assert kernels.as_cuda(kernels.read_text(name)).strip() in texts[0]
    assert texts[1] == kernels.as_cuda(kernels.read_text("fuse_heads.metal"))
    assert names.startswith("// ") and set(names.split()[1:]) == set(
        re.findall(r"\w+_shape|\w+_strides|\w+_ndim", texts[1])
    )
    # What is there is taken, and what has been cut short by nobody is whole.
    written = [file.stat().st_mtime_ns for file in files]
    assert kernels.cuda_text(kernel) == (header, body)
    assert [file.stat().st_mtime_ns for file in files] == written
    other = kernels.Kernel("fuse_heads", (), (), ("heads.h",))
    assert kernels.cuda_text(other)[0] != header and kernels.cuda_text(other)[1] == body


def test_text_that_is_not_whole_is_written_anew(tmp_path, monkeypatch):
    kernel = kernels.Kernel("fuse_heads", (), (), ("heads.h",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = kernels.cuda_text(kernel)
    for file in (tmp_path / "mlx_hydra").iterdir():
        text = file.read_text()
        for broken in (b"\xff\xfe", text[:100].encode()):
            file.write_bytes(broken)
            assert kernels.cuda_text(kernel) == lines
            assert file.read_text() == text
        # A full disk leaves neither the file nor a part of it.
        file.unlink()

        def full(*_):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", full)
            left = kernels.cuda_text(kernel)
            assert [text in part for part, line in zip(left, lines) if part != line] == [True]
        assert len(list((tmp_path / "mlx_hydra").iterdir())) == 1
        assert kernels.cuda_text(kernel) == lines


@pytest.mark.parametrize("name", ['a "quoted" one', "of two\nlines", "\udcff"])
def test_a_folder_that_no_line_of_c_can_name_is_not_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    for text in kernels.cuda_text(kernels.Kernel("fuse_heads", (), (), ("heads.h",))):
        assert "#include" not in text.replace("#include <", "")
        text.encode()


def test_where_nothing_can_be_written_cuda_gets_the_text(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel = kernels.Kernel("fuse_heads", (), (), ("heads.h",))
    texts = kernels.cuda_text(kernel)
    for name, text in zip(("heads.h", "fuse_heads.metal"), texts):
        assert kernels.as_cuda(kernels.read_text(name)).strip() in text
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert kernels.cuda_text(kernel) == texts


def test_numbers_are_one_array_for_all_calls():
    numbers = kernels.constant((5, 7), mx.int32)
    assert kernels.constant((5, 7), mx.int32) is numbers
    assert (numbers.tolist(), numbers.dtype) == ([5, 7], mx.int32)
    assert kernels.constant((5, 7), mx.float32).dtype == mx.float32


def test_every_kernel_says_what_it_is_before_it_begins():
    folder = kernels.folder()
    files = sorted(folder.glob("*.metal"))
    assert files
    for file in files:
        head = re.match(r"(//.*\n)+", file.read_text())
        assert head is not None, file
        for word in ("Grid", "threadgroup"):
            assert word.lower() in head[0].lower(), f"{file.name} does not tell its {word}"


def test_no_kernel_has_more_buffers_than_metal_binds():
    found = [
        value
        for name in sorted((Path(kernels.__file__).parent / "ops").glob("*.py"))
        for value in vars(importlib.import_module(f"mlx_hydra.ops.{name.stem}")).values()
        if isinstance(value, kernels.Kernel)
    ]
    assert {f"{kernel.name}.metal" for kernel in found} == {
        path.name for path in kernels.folder().glob("*.metal")
    }
    for kernel in found:
        body = kernels.read_text(f"{kernel.name}.metal")
        # MLX passes what the text of the body names; of contiguous inputs as of others.
        told = [
            f"{name}_{what}"
            for name in kernel.inputs
            for what in ("shape", "strides", "ndim")
            if f"{name}_{what}" in body
        ]
        assert len(kernel.inputs) + len(kernel.outputs) + len(told) <= 31, (kernel.name, told)


def test_member_functions_say_where_their_object_lies():
    # From Metal 4.1 on it may lie anywhere unless they do, and its arrays are no `thread` pointers.
    headers = "".join(file.read_text() for file in kernels.folder().glob("*.h"))
    members = re.findall(r"^ +METAL_FUNC [^{]*\{", headers, re.MULTILINE)
    assert members
    for member in members:
        assert re.search(r"\) (const )?thread \{$", member), member


@pytest.fixture
def cuda_names(monkeypatch, tmp_path):
    """What MLX names the CUDA kernels that are called; none runs, and outputs are zeros."""
    names = []

    def cuda_kernel(name, **_):
        def call(template, output_shapes, output_dtypes, **_):
            values = (str(x).rpartition(".")[2].lower() for _, x in template)
            names.append("_".join([name, *values]))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return call

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    kernels.cache_clear()
    yield names
    kernels.cache_clear()


@pytest.mark.parametrize("full_gate", [None, 0])
def test_the_name_of_a_cuda_kernel_is_one_word(cuda_names, full_gate):
    H, F, D = 2, 1, 32
    weights = Weights(mx.ones(D), mx.ones(D), mx.zeros(H), mx.zeros(H), 1e-6)
    width = F * D + 3 * H * D + 2 * H
    gated_delta_step(
        mx.zeros((1, 1, width)),
        weights,
        mx.ones(F + H),
        state=None,
        past=None,
        eps=None,
        first=F * D,
        full=mx.zeros((1, F, 1, D)),
        full_gate=full_gate,
        backend="cuda",
    )
    assert re.fullmatch(r"\w+", cuda_names[0])


def test_cuda_knows_tiles_where_a_kernel_has_them(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda name, **text: texts.update({name: text}))
    kernels.cache_clear()
    every = [
        x
        for name, module in sys.modules.items()
        if name.startswith("mlx_hydra.ops.")
        for x in vars(module).values()
        if isinstance(x, kernels.Kernel)
    ]
    for kernel in every:
        kernels._build(kernel, "cuda", (), tuple(range(len(kernel.inputs))))
    kernels.cache_clear()
    assert len(texts) == len(list(kernels.folder().glob("*.metal")))
    for text in texts.values():
        header, body = (
            Path(re.search('#include "(.*)"', text[part])[1]).read_text()
            for part in ("header", "source")
        )
        assert ("mma_16(" in header) == ("tile<" in body)


@pytest.mark.parametrize("backend", [None, "metal", "cuda"])
def test_few_numbers_are_what_they_were(backend, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_backend", lambda: backend)
    for values, dtype in (((7,), mx.int32), ((-3, 2**31 - 1), mx.int32), ((1e-6, 0.5), mx.float32)):
        kernels.constant.cache_clear()
        found = kernels.constant(values, dtype)
        assert found.dtype == dtype
        assert np.array_equal(np.array(found), np.array(values, np.array(found).dtype))
        assert kernels.constant(values, dtype) is found
    # In a function that is compiled, too: it is not of that function.
    kernels.constant.cache_clear()
    double = mx.compile(lambda x: x * kernels.constant((2.0,), mx.float32))
    assert double(mx.ones(3)).tolist() == [2, 2, 2]
    assert kernels.constant((2.0,), mx.float32).tolist() == [2]
    for count in (1, 7):
        found = kernels.positions(131072, count)
        assert found.dtype == mx.int32 and found.size >= count
        assert set(found.tolist()) == {131072}
    for number in (0, 131072, -5):
        found = kernels.near(number)
        assert (found.dtype, found.shape, found.item()) == (mx.int32, (1,), number)


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_an_array_that_stands_in_for_others_is_passed_once(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built, called = [], []

    def make(**text):
        built.append(text)
        return lambda **call: called.append(call["inputs"]) or [None]

    monkeypatch.setattr(mx.fast, f"{backend}_kernel", make)
    monkeypatch.setattr(
        kernels, "read_text", lambda name: "o[0] = b[0] + a_shape[0] + b_shape[0] + c_strides[1];"
    )
    kernel = kernels.Kernel("some", ("a", "b", "c", "d"), ("o",))
    x, y, z = mx.zeros(8), mx.ones(8), mx.ones(9)
    launch = {"groups": (1, 1, 1), "threads": (32, 1, 1), "template": []}
    kernels.cache_clear()
    for inputs in ([x, y, x, y], [x, y, z, y], [x, y, z, mx.ones(8)], [y, z, y, z]):
        kernel(backend, inputs, output_shapes=[(1,)], output_dtypes=[mx.float32], **launch)
    kernels.cache_clear()
    # What is built once is called twice.
    names = [text["input_names"] for text in built]
    assert names == [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    given = [[x, y], [x, y, z], [x, y, z], [y, z]]
    for found, wanted in zip(called, given):
        assert all(map(lambda a, b: a is b, found, wanted))
    first, second, third = (text["source"].split("o[0]")[0] for text in built)
    if backend == "metal":
        assert third == ""
        assert first == (
            "const auto c = a;\nconst auto c_strides = a_strides;\nconst auto d = b;\n"
        )
        assert second == "const auto d = b;\n"
    else:
        assert "const auto c_strides = a_strides;" in first
        assert "const auto c" not in second and "const auto d = b;" in second
    assert len({text["name"] for text in built}) == 3


def test_cuda_kernels_for_other_types_have_other_names(cuda_names):
    kernel = kernels.Kernel("gated_delta_starts", ("state", "ends"), ("starts",))
    for dtype in (mx.float32, mx.float16, mx.float16):
        inputs = [mx.zeros(8, dtype), mx.zeros(8)]
        launch = {"groups": (1, 1, 1), "threads": (32, 1, 1), "template": [("H", 1)]}
        kernel("cuda", inputs, output_shapes=[(8,)], output_dtypes=[mx.float32], **launch)
    single, half, again = cuda_names
    assert single != half == again
