"""Data sets, their annotations, transforms, loading and metrics; datasets/build.py builds a data set by its format."""
