"""From a dataset folder and a base to a fine-tune: the recipe, its step, and everything that they need.

Knows what to train, how and when; does not know where files come from, Cog, or how to draw pictures.
"""
