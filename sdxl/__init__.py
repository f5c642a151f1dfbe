"""The work behind the entry points, in rooms: `files`, `model`, `speed`, `data`, `training`, `serving`.

Imports point one way: training and serving → data, model and speed → files → settings and errors. Training and serving
never import each other. `tests/test_structure.py` checks this.
"""

__version__ = "0.1.0"
