"""Run a job's commands one after the other in one process, as a user would on a command line.

    python examples/reproduction/chain.py JOB.json

One process, because a new one for each command would spend more time on its start than on these
small models. What a command has written already is not made again.
"""

import gc
import importlib
import json
import shlex
import sys
import time
from pathlib import Path

import mlx.core as mx

# The modules whose main() takes what stands after the command's name.
COMMANDS = {
    "mlx_hydra.select": "mlx_hydra.select",
    "mlx_hydra.convert": "mlx_hydra.convert",
    "mlx_hydra.distill": "mlx_hydra.distill.command",
    "prepare.py": "prepare",
    "evaluate.py": "evaluate",
    "change_config.py": "change_config",
}


def run(commands: list[dict]) -> dict[str, float]:
    """Seconds of each command that ran: ``{command: [name, arguments ..], makes: path}``."""
    seconds = {}
    for entry in commands:
        name, *arguments = entry["command"]
        if (makes := entry.get("makes")) and Path(makes).exists():
            print(f"{makes} is there already.", flush=True)
            continue
        print("$", shlex.join([name, *arguments]), flush=True)
        started = time.perf_counter()
        importlib.import_module(COMMANDS[name]).main(arguments)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"({seconds[name]} s)", flush=True)
        gc.collect()
        mx.clear_cache()
    return seconds


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # Several processes share a GPU, and none knows what the others hold.
    mx.set_memory_limit(int(job["gigabytes"] * 1e9))
    done = Path(job["done"])
    seconds = run(job["commands"])
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps({"seconds": seconds}))
    partial.rename(done)


if __name__ == "__main__":
    main()
