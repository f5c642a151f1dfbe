"""Fine-tuning and serving of SDXL, without the doors: nothing in this package imports cog."""
