"""The process that runs compiled kernels: it forks a child for each, so a crash ends only that.

Started by runner.py as `python host.py`; one JSON request a line in, one reply a line out. It
imports neither MLX nor NumPy, so that a fork is cheap and safe.
"""

import ctypes
import json
import mmap
import os
import signal
import sys

PAGE = 4096
STACK = 256 * 1024
SHADOW = 56  # sizeof(Shadow) in runtime.cpp
ARRAY_BITS = 16

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000


def reserve(size, protection):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return check(libc.mmap(None, max(size, PAGE), protection, flags, -1, 0))


def check(address):
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap failed")
    return address


def words(values):
    return (ctypes.c_uint64 * max(len(values), 1))(*values)


def run(request, worker):
    """Maps what `request` names and runs this worker's share of the threadgroups."""
    both = mmap.PROT_READ | mmap.PROT_WRITE
    fd = os.open(request["data"], os.O_RDWR)
    library = ctypes.CDLL(request["library"])
    anchor = ctypes.addressof(ctypes.c_char.in_dll(library, "metalsim_anchor"))
    base = anchor - request["anchor"]

    largest = max((b["bytes"] for b in request["buffers"]), default=0)
    slot_bits = (4 * largest + (4 << 20)).bit_length()
    slots = reserve(len(request["buffers"]) << slot_bits, 0)
    buffers = []
    for i, b in enumerate(request["buffers"]):
        address = slots + (i << slot_bits) + (1 << (slot_bits - 2))
        if b["bytes"]:
            flags = mmap.MAP_SHARED | MAP_FIXED
            check(libc.mmap(address, b["bytes"], both, flags, fd, b["offset"]))
        shadow = 0
        if request["checked"] and b["writable"]:
            shadow = reserve((b["bytes"] // b["granule"] + 1) * SHADOW, both)
        mask = 0
        if b["mask_bytes"]:
            mask = check(
                libc.mmap(None, b["mask_bytes"], both, mmap.MAP_SHARED, fd, b["mask_offset"])
            )
        state = [b["writable"], b["initialised"], b["granule"], b["counted"], shadow, mask]
        buffers += [address, b["bytes"], *state]
    arrays = [[base + address, size] for address, size in request["arrays"]]
    array_shadow = reserve(len(arrays) * (SHADOW << 15), both) if request["checked"] else 0

    n = 1
    for size in request["threads"]:
        n *= size
    stacks = reserve(n * STACK, both)
    for i in range(n):
        libc.mprotect(stacks + i * STACK, PAGE, 0)
    report = check(libc.mmap(None, PAGE, both, mmap.MAP_SHARED, fd, worker * PAGE))
    buffer_words, array_words = words(buffers), words([x for a in arrays for x in a])
    run_words = words(
        [
            *(request["checked"], request["strict"], request["seed"], worker, request["workers"]),
            *request["grid"],
            *request["threads"],
            *(report, slots, slot_bits, len(request["buffers"])),
            *(len(arrays), arrays[0][0] if arrays else 0, ARRAY_BITS, array_shadow),
            *(stacks, STACK, base, base + request["image"]),
            *(ctypes.addressof(buffer_words), ctypes.addressof(array_words)),
        ]
    )
    signal.alarm(request["timeout"])
    library.metalsim_run(run_words)


def child(request, worker):
    status = 1
    try:
        run(request, worker)
        status = 0
    except BaseException as e:
        print(f"metalsim host: {e!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def main():
    # Mathematical functions of the kernels are the C library's.
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for worker in range(request["workers"]):
            pid = os.fork()
            if pid == 0:
                child(request, worker)
            pids.append(pid)
        status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
