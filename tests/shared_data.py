"""Recorded numbers and small data sets beside the checkout; tests that need them are skipped where they are absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / 'shared'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='needs the folder shared/ beside the checkout')
