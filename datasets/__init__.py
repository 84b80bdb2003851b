"""Datasets, their annotations, transforms, loading and metrics; datasets/build.py builds a dataset by its format."""
