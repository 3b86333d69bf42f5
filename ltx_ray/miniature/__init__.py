"""The miniature: a trained LTX-2.3 in the released file formats, small enough to ship with the package.

It draws a world of one object on one ground, with one sound (`world.py`, `picture.py`, `sound.py`), and is the gauge by
which precision, layouts and samplers are judged for quality. `shape.py` has its sizes, `export.py` its file formats,
`measure.py` the plain rules that read a clip. `scripts/train_miniature.py` makes its weights.

Importing this is cheap; torch is imported by the modules that need it.
"""
