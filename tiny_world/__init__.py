"""A procedural picture world and the pretraining of a miniature SDXL on it."""
