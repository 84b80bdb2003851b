"""
Everything that only training needs.

No module of `models/` imports this package at module level. `build_model` imports it inside the function.
"""

from .supervision import build_supervision, coefficients

__all__ = ['build_supervision', 'coefficients']
