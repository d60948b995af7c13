#!/usr/bin/env bash
# Everything that needs a GPU, in the order in which it pays: the kernels' tests, each operation
# against its peers, the whole model against the dense one, LoRA, head selection. Writes into
# benchmarks/results/.
#   benchmarks/gpu.sh NAME       e.g. benchmarks/gpu.sh h100, benchmarks/gpu.sh m4-max
set -euo pipefail
name=${1:?usage: benchmarks/gpu.sh NAME, a name for this machine in the results}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=benchmarks/results
"$python" -c 'import sys; from mlx_hydra.kernels import gpu_backend as g; sys.exit(not g())' ||
  { echo "benchmarks/gpu.sh: MLX sees no GPU here." >&2; exit 2; }
# Most of their time is the compiler's, which each process needs for itself.
"$python" -m pytest -vv -n "${WORKERS:-4}" --dist worksteal tests/test_kernels.py \
  tests/test_gated_delta_kernels.py tests/test_gated_delta_inputs.py \
  tests/test_gated_delta_vjp_kernel.py tests/test_gated_delta_step.py \
  tests/test_head_attention_inputs.py tests/test_head_attention_kernels.py \
  tests/test_fuse_heads_kernels.py tests/test_normed_linear.py \
  tests/test_model_kernels.py --durations=20 2>&1 | tee "$results/kernel-tests-$name.txt"
"$python" benchmarks/kernels.py --out "$results/kernels-$name.json"
"$python" benchmarks/model.py --out "$results/model-$name.json"
"$python" benchmarks/lora.py --out "$results/lora-$name.json"
"$python" benchmarks/select_cost.py --out "$results/select-$name.json"
