"""The miniature: a trained LTX-2.3 in the released file formats, small enough to ship with the package.

Its world (`world.py`, `picture.py`, `sound.py`) is one object on one ground, with one sound. The miniature is meant for
judging how precision, layouts and samplers affect quality. `config.py` holds its sizes, `export.py` writes its files,
and `measure.py` reads clips by plain rules. `scripts/train_miniature.py` trains it. docs/miniature.md says which parts
are trained; nothing else in the package uses them yet.

Importing this package does not import torch.
"""
