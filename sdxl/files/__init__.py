"""Bytes from strangers: archives, downloads, the Hugging Face hub, safetensors files.

Knows how to read and write them safely; does not know what is in them.
"""
