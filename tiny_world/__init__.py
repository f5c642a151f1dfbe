"""A drawn world of simple pictures, and the pretraining of the miniature SDXL on it."""
