"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def save_atomically(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Calls `save` with a name beside `path`, of the same suffix, then moves the file to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
