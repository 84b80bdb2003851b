"""Swin equals the official detection backbone, whatever the size of the picture."""

import numpy as np
import pytest
import torch

from models.swin import SWIN_SIZES, SwinTransformer, resize_table
from tests import rule
from tests.parity import assert_close, float64
from tests.shared_data import SHARED, needs_shared, read_shared

RECORD = read_shared('parity/h_deformable_detr/swin_features.json')
NAMES = {
    'tiny_w7': 'swin_tiny', 'small_w7': 'swin_small', 'base_w12': 'swin_base_window12', 'large_w7': 'swin_large',
    'large_w12': 'swin_large_window12',
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize(
    'variant', [name if name == 'tiny_w7' else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_features_equal_official(variant: str) -> None:
    case = RECORD['variants'][variant]
    with np.load(SHARED / 'parity/h_deformable_detr/swin_features.npz') as archive:
        arrays = {name: value for name, value in archive.items() if name.startswith(variant)}
    with float64():
        model = rule.fill(SwinTransformer(SWIN_SIZES[NAMES[variant]], range(1, 5)), 'swin/').eval()
        assert sum(p.numel() for p in model.parameters()) == case['n_parameters']
        for number, picture in enumerate(case['images']):
            pixels = rule.picture(picture['name'], picture['height'], picture['width'])
            with torch.no_grad():
                maps = model(pixels[None])
            for index, level in enumerate(picture['levels']):
                found = maps[str(index + 1)]
                assert list(found.shape) == level['shape']
                key = f'{variant}_{number}_level{index}'
                flat = found.flatten()[:: level['stride_of_flat']]
                assert_close(flat, arrays[key], key, rtol=1e-9)


@needs_shared
def test_bias_tables_are_resized_as_official() -> None:
    with float64():
        table = torch.from_numpy(rule.parameter('swin/table', (169, 3)))
        with np.load(SHARED / 'parity/h_deformable_detr/swin_features.npz') as archive:
            assert_close(resize_table(table, 529), archive['bias_table_169_to_529'], 'table')


@needs_shared
def test_drop_path_rates_are_the_official_ones() -> None:
    for name, rate, key in (
        ('swin_tiny', 0.2, 'rate0.2_depths2262'),
        ('swin_small', 0.5, 'rate0.5_depths22182'),
    ):
        model = SwinTransformer(SWIN_SIZES[name], range(2, 5), rate)
        rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
        np.testing.assert_allclose(rates, RECORD['drop_path_schedule'][key], rtol=1e-6)
