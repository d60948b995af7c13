"""What every result says of the run that it comes from."""

import json
from datetime import date
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx_lm


def device() -> str:
    return mx.device_info().get("device_name", str(mx.default_device()))


def write(path: Optional[Path], **content: Any) -> None:
    """Write a result as JSON behind date, device and versions; where path is None, do nothing."""
    if path is None:
        return
    about = {
        "date": date.today().isoformat(),
        "device": device(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
    }
    path.write_text(json.dumps({**about, **content}, indent=2) + "\n")
