"""Multi-scale deformable attention (arXiv:2010.04159): one operator, four implementations of it, one module."""
