"""From a request to pictures: fine-tunes put into the base and taken out again, drawing, safety, delivery.

Knows requests and pipelines; does not know training or Cog.
"""
