"""SDXL itself: its parts, a fine-tune on disk, and the LoRA formats of other tools.

Knows names, shapes and precisions of weights; does not know training recipes, requests or pictures.
"""
