"""HydraHead for MLX: full attention for the heads that retrieval needs, linear for the rest.

Importing the package makes mlx-lm load the model type ``hydrahead`` like one of its own.
"""

import sys

from .models import hydrahead

__version__ = "0.1.0"

# mlx-lm looks an architecture up as the module mlx_lm.models.<model_type>.
sys.modules.setdefault("mlx_lm.models.hydrahead", hydrahead)
