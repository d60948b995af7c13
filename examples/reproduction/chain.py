"""Run jobs one after the other in one process: their commands, as a user would type them.

    python examples/reproduction/chain.py < FILE

Each line read is a job's file, as run.py writes them; each is answered by a line: "done" or
"failed". One process for many, because on a GPU a new one spends minutes on compiling its kernels,
far more than these small models take. What a command has written already is not made again.
"""

import gc
import importlib
import json
import os
import random
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import mlx.core as mx
import numpy as np

# The modules whose main() takes what stands after the command's name.
COMMANDS = {
    "mlx_hydra.select": "mlx_hydra.select",
    "mlx_hydra.convert": "mlx_hydra.convert",
    "mlx_hydra.distill": "mlx_hydra.distill.command",
    "prepare.py": "prepare",
    "evaluate.py": "evaluate",
    "change_config.py": "change_config",
    "receivers.py": "receivers",
}
SEED = 0
# How a command exits that was interrupted.
INTERRUPTED = 130


def run(commands: list[dict]) -> dict[str, float]:
    """Seconds of each command that ran: ``{command: [name, arguments ..], makes: path}``."""
    seconds = {}
    for entry in commands:
        name, *arguments = entry["command"]
        if (makes := entry.get("makes")) and Path(makes).exists():
            print(f"{makes} is there already.", flush=True)
            continue
        print("$", shlex.join([name, *arguments]), flush=True)
        # Whatever this process ran before.
        for seed in (mx.random.seed, np.random.seed, random.seed):
            seed(SEED)
        started = time.perf_counter()
        importlib.import_module(COMMANDS[name]).main(arguments)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"({seconds[name]} s)", flush=True)
        give_back_memory()
    return seconds


def give_back_memory() -> None:
    gc.collect()
    mx.clear_cache()


def run_job(path: Path) -> bool:
    """Whether a job came to its end; if not, its log tells why."""
    job = json.loads(path.read_text())
    # Several processes share a GPU, and none knows what the others hold.
    mx.set_memory_limit(int(job["gigabytes"] * 1e9))
    try:
        seconds = run(job["commands"])
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise
        # A number: the command has told what is wrong.
        if isinstance(end.code, str):
            print(end.code)
        return False
    except Exception:
        traceback.print_exc()
        return False
    done = Path(job["done"])
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps({"seconds": seconds}))
    partial.rename(done)
    return True


def write_to(path: Path) -> None:
    """Have all that is printed from now on in a file, be it from Python or not."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)


def main() -> None:
    # A shell's background job ignores it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        path = Path(line.strip())
        write_to(path.with_name("log.txt"))
        done = run_job(path)
        give_back_memory()
        sys.stdout.flush()
        print("done" if done else "failed", file=answers, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
