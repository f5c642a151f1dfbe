"""What suits the miniature in base_models/, which has 7 million UNet parameters and knows simple scenes.

Knows inputs of training and drawing by their names; does not know what they do. The presets and defaults suit SDXL.
"""

from typing import Any

STEPS = 260
"""Of a good training."""
TRAINING: dict[str, Any] = {
    "lora_rank": 32,
    "lora_targets": "all",
    "lora_lr": 2e-3,
    "ti_lr": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0,
    "random_views": 0,
    "preservation_prompts": "a red house on a plain blue background|a small green cup on the left on a white dotted background"
    "|a photo of a yellow star in the middle|a photo of an orange fish on a gray striped background|a large purple car"
    "|a blue mushroom right of a brown tree on a plain pink background",
}
"""Inputs of `train`. Random views pay off in longer runs only."""
DRAWING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3}
"""Inputs of `predict`."""
