"""The miniature: a trained LTX-2.3 in the released file formats, small enough to ship with the package.

Its world (`world.py`, `picture.py`, `sound.py`) is one object on one ground, with one sound. The miniature is meant for
judging how precision, layouts and samplers affect quality. `config.py` holds its sizes, `export.py` writes its parts,
`files.py` makes a model of them for `--model miniature`, and `measure.py` and `judge.py` read clips by plain rules.
`scripts/train_miniature.py` trains it and `scripts/quality.py` scores it.

Importing this package does not import torch.
"""
