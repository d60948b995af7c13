"""``python -m mlx_hydra.distill``."""

from .command import main

if __name__ == "__main__":
    main()
