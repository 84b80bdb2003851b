from .ms_deform_attn_func import (
    available,
    describe,
    exporting,
    implementation,
    is_exporting,
    ms_deform_attn,
    ms_deform_attn_core_pytorch,
    use_implementation,
)

__all__ = [
    'available',
    'describe',
    'exporting',
    'implementation',
    'is_exporting',
    'ms_deform_attn',
    'ms_deform_attn_core_pytorch',
    'use_implementation',
]
