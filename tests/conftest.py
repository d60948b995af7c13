import os

import hypothesis

# Where a GPU has TF32, MLX rounds float32 products to 10 bits unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The same examples on every run: a failure here is a failure everywhere.
hypothesis.settings.register_profile(
    "mlx_hydra", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("mlx_hydra")
