"""Random numbers for one piece of work, without effect on the rest of the program."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed(*numbers: int) -> int:
    """Hash any numbers to one seed of 63 bits."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


@contextmanager
def local_seed(*numbers: int) -> Iterator[None]:
    """Seed Python's `random` and torch's CPU generator in the block, and restore both afterwards.

    NumPy's and the devices' generators are not touched.
    """
    seed = mixed(*numbers)
    python_state = random.getstate()
    torch_state = torch.default_generator.get_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
