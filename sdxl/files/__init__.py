"""Files from strangers: archives, downloads, the Hugging Face hub and safetensors files.

Knows how to read and write them safely; does not know what they contain.
"""
