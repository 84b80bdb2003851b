"""
Weights: `read.py` and `write.py` read and write files, `names.py` has the names of other projects.

`layouts.py` renames entries, `records.py` finds flags and classes in a file, `load.py` fills a model, and
`backbones.py` fills a backbone.
"""
