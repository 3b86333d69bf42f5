"""The miniature: a trained LTX-2.3 in the released file formats, small enough to ship with the package.

Its world (`world.py`, `picture.py`, `sound.py`) is one object on one ground, with one sound. The miniature is meant for
judging how precision, layouts and samplers affect quality. `config.py` holds its sizes, `gemma.py` and `export.py`
write the files of its parts, and `files.py` makes a model of them for `--model miniature`. `measure.py` reads frames
and sounds by plain rules, and `judge.py` reads clips. `scripts/train_miniature.py` trains it, and `scripts/quality.py`
scores it.

Importing this package does not import torch.
"""
