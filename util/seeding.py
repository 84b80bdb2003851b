"""Seeds and states of random number generators."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed(*numbers: int) -> int:
    """Hash numbers to one seed of 63 bits."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


@contextmanager
def local_seed(*numbers: int) -> Iterator[None]:
    """Seed Python's `random` and torch's CPU generator in the block, and restore both afterwards.

    The generators of NumPy and of devices do not change.
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


def get_rng_state() -> dict:
    """Return the states of all generators of this process as plain values and tensors."""
    twister = np.random.get_state(legacy=False)
    keys, pos = twister['state']['key'].tolist(), twister['state']['pos']
    state = {
        'python': random.getstate(),
        'numpy': [twister['bit_generator'], keys, pos, twister['has_gauss'], twister['gauss']],
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
