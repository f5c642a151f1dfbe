"""From a dataset folder and a base to a fine-tune: the recipe, its step, and what both need.

Knows what trains, how and when; does not know where files come from, Cog, or how pictures are drawn.
"""
