"""Planted faults: each is reported, by its kind and by the line of the kernel's text."""

import metalsim
import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(not metalsim.available(), reason="needs Linux and ziglang")

I = "uint i = thread_position_in_grid.x;"  # noqa: E741
STAGE = """uint i = thread_position_in_grid.x;
threadgroup float s[64];
s[i] = x[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
"""


def run(source, header="", threads=64, group=64, dtype=mx.float32, x=None, shape=(64,), **how):
    kernel = metalsim.Kernel("planted", ["x"], ["out"], source=source, header=header)
    return kernel(
        inputs=[mx.arange(64, dtype=mx.float32) if x is None else x],
        template=[("T", mx.bfloat16), ("H", mx.float16)],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **how,
    )[0]


# kind, part and line of the place, words of the message, source, and arguments of run.
FAULTS = {
    "device read past the end": (
        "out-of-bounds", "body:2", "x[64], which has 64 elements",
        I + "\nout[i] = x[i + 1];", {},
    ),
    "device read before the start": (
        "out-of-bounds", "body:2", "x[-1]",
        I + "\nout[i] = x[int(i) - 1];", {},
    ),
    "device write past the end": (
        "out-of-bounds", "body:2", "writes 4 bytes at out[64]",
        I + "\nout[i + (i == 63)] = x[i];", {},
    ),
    "device read far away": (
        "out-of-bounds", "body:2", "reads 4 bytes",
        I + "\nout[i] = x[i * 100000000];", {},
    ),
    "matrix load past the end": (
        "out-of-bounds", "body:2", "which has 64 elements",
        I + "\nsimdgroup_float8x8 m; simdgroup_load(m, x + 1, 8);\nsimdgroup_store(m, out, 8);",
        {"group": 32, "threads": 32},
    ),
    "threadgroup array past its end, into its neighbour": (
        "out-of-bounds", "body:5", "threadgroup s + 256 bytes, which has 256 bytes",
        STAGE.replace("s[64];", "s[64]; threadgroup float r[64]; r[i] = 1;")
        + "threadgroup float* p = s; out[i] = p[i + 1] + r[i];", {},
    ),
    "threadgroup array before its start": (
        "out-of-bounds", "body:5", "threadgroup s + -4 bytes",
        STAGE + "threadgroup float* p = s; out[i] = p[int(i) - 1];", {},
    ),
    "index past an array of the thread": (
        "array-index", "body:3", "index 4 is outside the array",
        I + "\nfloat a[4] = {1, 2, 3, 4};\nout[i] = a[4 + 0 * i];", {},
    ),
    "write to an input": (
        "read-only", "body:2", "x[",
        I + "\n((device float*)x)[i] = 1; out[i] = 0;", {},
    ),
    "unwritten threadgroup memory": (
        "unwritten", "body:4", "threadgroup s +",
        I + "\nthreadgroup float s[64];\nif (i < 63) { s[i] = x[i]; }\nout[i] = s[i];", {},
    ),
    "an output read before it is written": (
        "unwritten", "body:2", "out[",
        I + "\nout[i] += x[i];", {},
    ),
    "no barrier before the read": (
        "race", "body:6", "by thread",
        STAGE + "s[i] = 2 * x[i];\nout[i] = s[i ^ 1];", {},
    ),
    "no barrier before the next write": (
        "race", "body:6", "by thread",
        STAGE + "float y = s[(i + 40) % 64];\ns[i] = y; out[i] = 0;", {},
    ),
    "a barrier with the wrong flags": (
        "race", "body:7", "with no barrier between that orders them",
        STAGE + "s[i] = 2;\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = s[63 - i];", {},
    ),
    "simdgroup_barrier in place of threadgroup_barrier": (
        "race", "body:7", "written by thread",
        STAGE + "s[i] = 2;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[63 - i];",
        {},
    ),
    "matrix load of what lanes have just written": (
        "race", "body:7", "reads threadgroup s",
        STAGE + "s[i] = 2;\nsimdgroup_float8x8 m;\nsimdgroup_load(m, s, 8);\n"
        "simdgroup_store(m, out, 8);",
        {},
    ),
    "a race on device memory inside a threadgroup": (
        "race", "body:2", "writes out[",
        I + "\nout[i / 2] = x[i];", {},
    ),
    "a race between threadgroups": (
        "race", "body:2", "of another threadgroup",
        I + "\nout[0] = x[i];", {"group": 1},
    ),
    "a race through a barrier for threadgroup memory only": (
        "race", "body:4", "reads out[",
        I + "\nout[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "out[63 - i] = out[63 - i] + 1;",
        {},
    ),
    "a barrier that some threads never reach": (
        "divergent-barrier", "body:2", "24 threads of the threadgroup have left the kernel",
        I + "\nif (i < 40) { threadgroup_barrier(mem_flags::mem_threadgroup); }\nout[i] = 0;", {},
    ),
    "two barriers in two branches": (
        "divergent-barrier", "body:2", "at planted:body:3",
        I + "\nif (i < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); }\n"
        "else { threadgroup_barrier(mem_flags::mem_threadgroup); }\nout[i] = 0;",
        {},
    ),
    "a reduction in one branch": (
        "divergent-collective", "body:2", "simd_sum reached by 20 lanes",
        I + "\nout[i] = i < 20 ? simd_sum(x[i]) :\nsimd_max(x[i]);", {"group": 32, "threads": 32},
    ),
    "a simdgroup_barrier that some lanes have left behind": (
        "divergent-collective", "body:3", "simdgroup_barrier reached by 16 lanes only",
        I + "\nif (i % 32 < 16) { return; }\nsimdgroup_barrier(mem_flags::mem_none);", {},
    ),
    "a matrix product in half a SIMD-group": (
        "divergent-collective", "body:3", "reached by 16 lanes only",
        I + "\nsimdgroup_float8x8 m;\nsimdgroup_multiply(m, m, m); out[i] = 0;",
        {"group": 16, "threads": 16},
    ),
    "a shuffle from a lane that has left": (
        "inactive-lane", "body:3", "simd_shuffle_xor",
        I + "\nif (i % 2) { return; }\nout[i] = simd_shuffle_xor(x[i], ushort(1));", {},
    ),
    "a shuffle from lane 40": (
        "inactive-lane", "body:2", "in lane 0 takes from lane 40",
        I + "\nout[i] = simd_shuffle(x[i], ushort(40));", {},
    ),
    "a vector load at an odd address": (
        "misaligned", "body:2", "not aligned",
        I + "\nfloat4 y = *(const device float4*)(x + 1); out[i] = y.x;", {},
    ),
    "signed overflow": (
        "overflow", "body:2", "signed integer overflow",
        I + "\nint big = int(x[1]) * 2000000000 + int(x[2]) * 2000000000; out[i] = big;", {},
    ),
    "division by zero": (
        "divide-by-zero", "body:2", "integer division by zero",
        I + "\nout[i] = int(i) / int(x[0]);", {},
    ),
    "too much threadgroup memory": (
        "threadgroup-memory", "planted", "36864 bytes of threadgroup memory",
        I + "\nthreadgroup float s[9216];\ns[i] = x[i]; out[i] = s[i];", {},
    ),
    "too many threads": (
        "threads", "planted", "2048 threads",
        I + "\nout[i] = 0;", {"threads": 2048, "group": 2048, "shape": (2048,)},
    ),
    "a pointer that loses its address space": (
        "address-space", "body:3", "address_space(3)",
        STAGE.replace("\ns[i]", "auto p = s;\ndevice float* q = p; q[i] = 0; s[i]"), {},
    ),
    "an argument that names no address space": (
        "address-space", "header:1", "`const float* p` names no address space",
        I + "\nout[i] = get(x, i);",
        {"header": "float get(const float* p, uint i) { return p[i]; }\n"},
    ),
    "a short input, which is constant, passed as device": (
        "address-space", "body:2", "no matching function",
        I + "\nout[i] = get(x, 0);",
        {
            "header": "float get(const device float* p, uint i) { return p[i]; }\n",
            "x": mx.ones((4,)),
        },
    ),
    "double": (
        "double", "body:3", "use float",
        I + "\n// double in a comment is none\ndouble y = x[i]; out[i] = y;", {},
    ),
    "a lambda": (
        "lambda", "body:2", "no lambdas",
        I + "\nauto f = [&](float y) { return y + i; }; out[i] = f(x[i]);", {},
    ),
    "recursion": (
        "recursion", "header:3", "once calls itself",
        I + "\nout[i] = once(int(i));",
        {
            "header": "int once(int n);\nint twice(int n) { return n > 1 ? once(n) : 1; }\n"
            "int once(int n) { return n > 2 ? twice(n - 1) : 2; }\n"
        },
    ),
    "float to bfloat without a cast": (
        "conversion", "body:2", "implicit conversion to bfloat",
        I + "\nT y = x[i]; out[i] = y;", {},
    ),
    "a constant to bfloat without a cast": (
        "conversion", "body:2", "implicit conversion to bfloat",
        I + "\nT y = 0.0f; out[i] = y;", {},
    ),
    "bfloat to half without a cast": (
        "compile", "body:2", "cannot initialize",
        I + "\nH y = T(x[i]); out[i] = y;", {},
    ),
    "adding a float to a bfloat in place": (
        "conversion", "body:2", "implicit conversion to bfloat",
        I + "\nT y = T(x[i]); y += 1.0f; out[i] = y;", {},
    ),
    "a word that is not there": (
        "compile", "body:2", "undeclared identifier 'nothing'",
        I + "\nout[i] = nothing;", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name):
    kind, part, words, source, how = FAULTS[name]
    with pytest.raises(metalsim.Fault) as caught:
        run(source, **how)
    fault = caught.value
    assert fault.kind == kind, str(fault)
    # Which of the two accesses of a race comes second depends on the schedule.
    assert part in (str(fault) if kind == "race" else fault.place.split(" `")[0]), str(fault)
    assert words in str(fault)
    assert "\n" not in str(fault)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name", ["a barrier with the wrong flags", "no barrier before the next write"]
)
def test_faults_do_not_hang_on_the_schedule(name, seed):
    kind, _, _, source, how = FAULTS[name]
    with metalsim.metal(seed=seed), pytest.raises(metalsim.Fault) as caught:
        run(source, **how)
    assert caught.value.kind == kind


CLEAN = {
    "a barrier orders the threadgroup": STAGE + "out[i] = s[63 - i];",
    "a simdgroup_barrier orders the lanes": STAGE
    + "s[i] = 2;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[i ^ 1];",
    "a barrier for device memory": I
    + "\nout[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[63 - i] = x[i];",
    "lanes that write apart": I + "\nout[i ^ 1] = x[i];",
    "half the SIMD-groups reduce": STAGE + "if (i < 32) { s[i] = simd_sum(s[i]); } out[i] = s[i];",
    "a product is no pointer": I + "\nfloat T_ = 2; int n = 3; out[i] = (n * T_ * x[i]) + (n & 1);",
    "the address of a lane's own array": I
    + "\nfloat a[2] = {x[i], 1};\nthread float* p = a; out[i] = p[1] + p[0];",
    "bfloat with casts": I + "\nT y = T(x[i]); y = y * T(2.0f) + T(1); out[i] = y + 1.0f;",
}


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_reported_of_what_is_right(name):
    run(CLEAN[name])


def test_strict_lets_only_simdgroup_barrier_order_lanes():
    """A shuffle keeps lanes in step by default, as Apple's own kernels rely on."""
    source = STAGE + "s[i] = 2;\nfloat y = simd_sum(x[i]);\nout[i] = s[i ^ 1] + y;"
    run(source)
    with metalsim.metal(strict=True):
        run(CLEAN["a simdgroup_barrier orders the lanes"])
        with pytest.raises(metalsim.Fault, match=r"race: planted:body:7"):
            run(source)


def test_a_crash_is_an_error_report_and_ends_nothing_else():
    with pytest.raises(metalsim.Fault, match=r"crash: planted: the kernel ended with SIG"):
        run(I + "\n__builtin_trap();")
    with metalsim.metal(checked=False), pytest.raises(metalsim.Fault, match=r"crash.*checked"):
        run(I + "\nout[i] = x[i * 100000000];")
    assert run(I + "\nout[i] = x[i];").tolist() == list(range(64))


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("metalsim.runner.TIMEOUT_S", 1)
    with pytest.raises(metalsim.Fault, match="timeout: planted: the kernel still ran after 1 s"):
        run(I + "\nwhile (x[0] == 0) { out[i] = i; }")


def test_unchecked_mode_only_computes():
    with metalsim.metal(checked=False):
        assert run(I + "\nout[0] = 7;", shape=(1,)).tolist() == [7]
        left = run(I + "\nif (i % 2) { return; }\nout[i] = simd_shuffle_xor(x[i], ushort(1));")
        assert left[::2].tolist() == list(range(0, 64, 2))
