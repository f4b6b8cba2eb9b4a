"""Matryoshka: nested visual representations, from image files to a trained, evaluated, deployable
model.

Read first: `nested.py` (the idea), `data/loader.py` (the path of one image),
`train/train_imagenet.py` (the loop).
"""

__version__ = "0.2.0"
