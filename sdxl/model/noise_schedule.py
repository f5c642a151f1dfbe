"""What a base predicts, and the noise that it was trained with: the configuration of its scheduler.

Knows the names of diffusers' scheduler settings; does not know samplers or training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl.settings import Prediction

_FILE = Path("scheduler") / "scheduler_config.json"


def read_schedule(folder: Path, prediction: Prediction | None = None) -> dict[str, Any]:
    """The scheduler's configuration of the base in `folder`.

    prediction: what the base predicts, instead of what the configuration says.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    config = json.loads((folder / _FILE).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{_FILE} is not a JSON object")
    return predicting(config, prediction)


def write_schedule(folder: Path, config: Mapping[str, Any]) -> None:
    """The inverse of `read_schedule`."""
    (folder / _FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(dict(config), indent=2) + "\n")


def predicting(config: Mapping[str, Any], prediction: Prediction | None) -> dict[str, Any]:
    """`config`, changed to what the base predicts; unchanged for None."""
    match prediction:
        case None:
            return dict(config)
        case "epsilon":
            return {**config, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        case "v_prediction":
            return {**config, "prediction_type": "v_prediction"}
        case "v_prediction_ztsnr":
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            return {**config, "prediction_type": "v_prediction", **zero}


def prediction_type(config: Mapping[str, Any]) -> str:
    """diffusers' name of what the UNet predicts: "epsilon" or "v_prediction"."""
    return config.get("prediction_type") or "epsilon"


def has_zero_snr(config: Mapping[str, Any]) -> bool:
    """Whether the noise schedule ends in pure noise: zero terminal SNR (arXiv:2305.08891)."""
    return bool(config.get("rescale_betas_zero_snr"))
