"""Break each kernel in many small ways, and see that the tests notice every one.

    python tests/mutants.py                    # all of tests/mutants.json
    python tests/mutants.py gated_delta_chunk  # those of the files whose names hold this

A mutant of tests/mutants.json names a file of metal/, a piece of its text that stands there once,
what takes its place, and the tests that are to fail. The files themselves are not touched: this
module is also the pytest plugin that hands the mutant's text to the package.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
VARIABLE = "MLX_HYDRA_MUTANT"


def mutated(text: str, mutant: dict) -> str:
    if text.count(mutant["old"]) != 1:
        raise ValueError(
            f"{mutant['file']}: {mutant['old']!r} stands there {text.count(mutant['old'])} times, "
            "expected once; mend tests/mutants.json."
        )
    return text.replace(mutant["old"], mutant["new"])


def pytest_configure(config):
    mutant = json.loads(os.environ[VARIABLE])
    from mlx_hydra import kernels

    read_text = kernels.read_text

    def read_mutant(name):
        text = read_text(name)
        return mutated(text, mutant) if name == mutant["file"] else text

    kernels.read_text = read_mutant


def is_caught(mutant: dict) -> bool:
    tests = [str(TESTS / name) for name in mutant["tests"].split()]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutants", *tests],
        env={**os.environ, VARIABLE: json.dumps(mutant), "PYTHONPATH": str(TESTS)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    # 1: tests failed. Anything else but 0 is a fault of this script or of the table.
    if child.returncode not in (0, 1):
        raise RuntimeError(child.stdout[-2000:] + child.stderr[-2000:])
    return child.returncode == 1


def main() -> int:
    from mlx_hydra.kernels import read_text

    mutants = json.loads((TESTS / "mutants.json").read_text())
    if len(sys.argv) > 1:
        mutants = [m for m in mutants if sys.argv[1] in m["file"]]
    for mutant in mutants:
        mutated(read_text(mutant["file"]), mutant)
    missed = 0
    for mutant in mutants:
        started = time.perf_counter()
        caught = is_caught(mutant)
        missed += not caught
        print(
            f"{'caught' if caught else 'MISSED'} {mutant['file']}: "
            f"{mutant['old']!r} -> {mutant['new']!r} ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    print(f"{len(mutants) - missed} of {len(mutants)} mutants caught")
    return 1 if missed or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
