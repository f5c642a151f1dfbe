"""Fine-tuning and serving of SDXL, without the doors: nothing in this package imports cog."""

import logging

# diffusers imports torchao where it is installed, and on a machine without CUDA they would begin every log with
# kernels that could not be loaded: of torchao only an optimizer is used here, which has none.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
