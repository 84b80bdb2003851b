"""Multi-scale deformable attention (arXiv:2010.04159): an operator, four implementations of it, a module."""
