"""
Weights: `read.py` reads files of any kind, `names.py` knows the names of other projects, `records.py` finds flags and classes
in a file, `load.py` fills a model, `backbones.py` a backbone, `write.py` writes for other projects, `zoo.py` knows published
weights.
"""
