"""Detectors and what they consist of; `build.py` builds them from flags."""

from .build import build_detector, build_model, build_postprocessors, check_backbone

__all__ = ['build_detector', 'build_model', 'build_postprocessors', 'check_backbone']
