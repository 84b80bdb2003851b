"""Data in tar shards (WebDataset), for storage that is slow with many small files. No recipe needs it."""
