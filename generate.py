"""Ask a question of long documents: ``python generate.py --help``."""

from mlx_hydra.generate import main

if __name__ == "__main__":
    main()
