"""From a request to files: check the inputs, apply fine-tunes, draw, judge, mark, save.

Knows requests, pipelines and fine-tunes; does not know training or Cog. `request` says what a user may ask for, `painter`
draws it, `delivery` turns the pictures into files.
"""
