"""SDXL itself: its components, a fine-tune on disk, and the LoRA formats of other tools.

Knows the names, shapes and precisions of weights; does not know training recipes, requests or pictures.
"""
