"""From a folder of pictures to a dataset folder: captions, masks, crops, upscaling and advice.

Knows pictures, captions and the helper models that look at pictures; does not know SDXL or training.
"""
