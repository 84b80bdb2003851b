"""Datasets, their annotations, transforms, loading and metrics."""
