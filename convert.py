"""Bring a Qwen3 or HydraHead checkpoint to MLX: python convert.py --help"""

from mlx_hydra.convert import main

if __name__ == "__main__":
    main()
