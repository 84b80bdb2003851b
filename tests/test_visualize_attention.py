"""Attention that tools/visualize_attention.py draws: what the modules compute, at its place in the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.io import write_png

from datasets.class_map import ClassMap
from models import build_detector, build_postprocessors
from models.detector import Detector
from tests.models import DENSE, FAMILIES, SMALL, TWO_STAGE
from tools.visualize_attention import (
    LEGEND,
    PANEL,
    compute_attention,
    draw_heat,
    draw_points,
    get_args_parser,
    main,
    query_detections,
)
from util.command_line import run_command
from util.config.recorded import settle_recorded

PREPARED = {'img_size': 96, 'max_size': None, 'aug': 'detr'}
DENSE_FAMILIES = DENSE | {'pre-norm': {'pre_norm': True}, 'all, conditional': FAMILIES['all, conditional']}
SAMPLING = {name: flags for name, flags in FAMILIES.items() if name not in DENSE_FAMILIES}
SAMPLING['two stages, square'] = TWO_STAGE | {'aug': 'lsj', 'img_size': 128}
NAMES = ('disc', 'ring', None, 'triangle', 'star', 'cross')
dense = pytest.mark.parametrize('flags', DENSE_FAMILIES.values(), ids=DENSE_FAMILIES)
sampling = pytest.mark.parametrize('flags', SAMPLING.values(), ids=SAMPLING)


def small(flags: dict) -> Detector:
    """A detector whose matrices are all random, offsets and weights of points too."""
    torch.manual_seed(0)
    args = settle_recorded(SMALL | PREPARED | flags)
    model = build_detector(args, {'one2one': args.num_queries})
    for parameter in (*model.transformer.parameters(), *model.bbox_embed.parameters()):
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return Detector(model, build_postprocessors(args), ClassMap(tuple(range(6)), NAMES), args)


def padded(flags: dict) -> Detector:
    """The same, whose images are padded to sides of 128 pixels."""
    detector = small(flags)
    detector.model.multiple = 128
    return detector


@pytest.fixture
def image() -> Tensor:
    return torch.randint(0, 256, (3, 48, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def note_calls(detector: Detector, layer: int) -> tuple[nn.Module, list]:
    """The cross-attention of a layer; and a list that its arguments and outputs are added to."""
    chosen, calls = detector.model.transformer.decoder.layers[layer], []
    module = getattr(chosen, 'cross_attn', None) or chosen.multihead_attn
    module.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    return module, calls


@dense
def test_dense_weights_make_the_output_of_the_module(flags: dict, image: Tensor) -> None:
    detector = padded(flags)
    for layer in (0, -1):
        module, calls = note_calls(detector, layer)
        found = compute_attention(detector, image, layer)
        ((args, options, output),) = calls
        hidden = options['key_padding_mask'][0] if options else args[3][0, 0, 0]  # [S]
        weights = found.weights.flatten(2)  # [M, Q, S]
        assert found.weights.shape == (4, flags.get('num_queries', 12), *found.shapes[0])
        assert hidden.any() and not weights[..., hidden].any() and weights.std() > 1e-3
        torch.testing.assert_close(weights[..., ~hidden].sum(-1), torch.ones(weights.shape[:2]))
        values = args[2][0]  # [S, C], or [M, S, D] in Conditional DETR
        if isinstance(module, nn.MultiheadAttention):
            matrix, bias = module.in_proj_weight.chunk(3)[2], module.in_proj_bias.chunk(3)[2]
            values, output = F.linear(values, matrix, bias).unflatten(-1, (4, -1)).transpose(0, 1), output[0]
        ours = module.out_proj((weights @ values).transpose(0, 1).flatten(1))
        torch.testing.assert_close(ours, output[0], rtol=1e-4, atol=1e-4)
        assert found.points is None and found.reference is None


def sample(found: object, values: Tensor) -> Tensor:
    """Sum of weighted bilinear samples [Q, C] of values [S, M, D]."""
    sizes, total = [height * width for height, width in found.shapes], 0
    for level, (part, shape) in enumerate(zip(values.split(sizes), found.shapes, strict=True)):
        maps = part.permute(1, 2, 0).unflatten(-1, shape)  # [M, D, H, W]
        places = 2 * found.points[:, :, level] * found.share[level] - 1  # [Q, M, P, 2]
        samples = F.grid_sample(maps, places.transpose(0, 1), align_corners=False)  # [M, D, Q, P]
        total = total + torch.einsum('mdqp,qmp->qmd', samples, found.weights[:, :, level])
    return total.flatten(1)


@sampling
def test_points_and_weights_make_the_output_of_the_module(flags: dict, image: Tensor) -> None:
    detector = padded(flags)
    for layer in (0, -1):
        module, calls = note_calls(detector, layer)
        found = compute_attention(detector, image, layer)
        ((args, options, output),) = calls
        queries = len(output[0])
        assert found.weights.shape == (queries, 4, len(found.shapes), module.n_points)
        assert found.points.shape == (*found.weights.shape, 2) and len(found.reference) == queries
        torch.testing.assert_close(found.weights.sum((-2, -1)), torch.ones(queries, 4))
        assert found.weights.std() > 0.01 and found.points.std(0).min() > 1e-3
        hidden = options['input_padding_mask'][0]
        assert hidden.any() or 'aug' in flags
        values = module.value_proj(args[2][0]).masked_fill(hidden[:, None], 0)
        ours = module.output_proj(sample(found, values.unflatten(-1, (4, -1))))
        torch.testing.assert_close(ours, output[0], rtol=1e-4, atol=1e-4)
    # The image is as wide as the grey square and 48 / 70 as high, or 140 x 96 pixels of 256 x 128.
    share = torch.tensor([1, 48 / 70] if 'aug' in flags else [140 / 256, 96 / 128])
    assert (found.share[0] - share).abs().max() < 0.05


def test_references_are_positions_in_the_image_without_padding(image: Tensor) -> None:
    detector = padded({'deformable': True})
    model = detector.model
    query_pos = model.query_embed.weight[:, : model.transformer.level_embed.shape[1]]
    expected = model.transformer.reference_points(query_pos).sigmoid()
    torch.testing.assert_close(compute_attention(detector, image).reference, expected, rtol=1e-5, atol=1e-5)
    detector = padded({'with_box_refine': True} | TWO_STAGE)
    found = compute_attention(detector, image)
    layer = compute_attention(detector, image, 1).reference
    assert layer.shape == (12, 4) and not torch.allclose(layer, found.reference)


def test_hooks_leave_nothing_behind_even_after_an_error(image: Tensor) -> None:
    detector = small({})
    before = detector.detect(image)
    detector.model.class_embed.forward, kept = None, detector.model.class_embed.forward
    with pytest.raises(TypeError):
        compute_attention(detector, image)
    detector.model.class_embed.forward = kept
    compute_attention(detector, image)
    hooks = [*detector.model.modules(), detector.postprocessors['bbox']]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hooks)
    assert all(torch.equal(value, before[name]) for name, value in detector.detect(image).items())


@pytest.mark.parametrize(
    'flags',
    [{}, {'conditional': True}, {'conditional': True, 'nms_iou_threshold': 0.3}, {'dino': True}],
    ids=['softmax', 'best pairs', 'nms', 'soft nms'],
)
def test_queries_have_the_boxes_and_scores_of_their_detections(flags: dict, image: Tensor) -> None:
    detector = small(flags)
    found, result = compute_attention(detector, image), detector.detect(image)
    best = query_detections(detector, found, [], 4)
    named = torch.tensor([name is not None for name in NAMES])[result['labels']]
    scores = torch.stack([one['scores'] for one in best.values()])
    assert len(best) == 4 and scores[0] == result['scores'][named].max() and (scores.diff() <= 0).all()
    alone = query_detections(detector, found, [5, 2], 4)
    assert list(alone) == [5, 2]
    for query, one in (best | alone).items():
        x, y, width, height = (
            found.outputs['pred_boxes'][0, query] * torch.tensor([70, 48, 70, 48])
        ).tolist()
        expected = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        if 'dino' in flags:  # clipped
            expected = expected.clamp(min=0).minimum(torch.tensor([70.0, 48, 70, 48]))
        torch.testing.assert_close(one['boxes'], expected)
    for query, one in alone.items():
        logits = found.outputs['pred_logits'][0, query]
        probability = logits.sigmoid() if flags else logits.softmax(-1)[:-1]
        torch.testing.assert_close(one['scores'], probability.max())
        assert one['labels'] == probability.argmax()


def test_queries_without_a_detection_can_be_named(image: Tensor) -> None:
    """Soft-NMS drops pairs of nearly no score."""
    detector = small({'dino': True})
    nn.init.constant_(detector.model.class_embed[-2].bias, -20.0)
    found = compute_attention(detector, image)
    assert list(query_detections(detector, found, [7], 1)) == [7]
    with pytest.raises(ValueError, match='nothing was detected in the image: name queries'):
        query_detections(detector, found, [], 1)


def test_heat_lies_where_the_cell_is() -> None:
    weights = torch.zeros(4, 8)
    weights[1, 1] = 0.5
    for share, centre in (((1.0, 1.0), (30, 30)), ((0.5, 0.5), (60, 60))):  # x, y in pixels
        drawn = np.array(draw_heat(torch.zeros(80, 160, 3), weights, torch.tensor(share))).sum(-1)
        y, x = np.unravel_index(drawn.argmax(), drawn.shape)
        assert abs(x + 0.5 - centre[0]) <= 1 and abs(y + 0.5 - centre[1]) <= 1
        around = (
            4 / 32 / share[0] / share[1]
        )  # cells that interpolation reaches, and the image they are drawn in
        assert 0.6 * around < (drawn > 0).mean() < 1.05 * around


def test_points_lie_where_they_are_sampled() -> None:
    weights = torch.tensor([0.2, 0.8]).view(1, 2, 1)  # two levels
    points = torch.tensor([[0.25, 0.5], [0.75, 0.25]]).view(1, 2, 1, 2)
    drawn = np.array(draw_points(torch.full((400, 800, 3), 9.0), weights, points, torch.tensor([0.5, 0.9])))
    assert tuple(drawn[100, 600]) == (255, 255, 160) and tuple(drawn[360, 400]) == (255, 255, 255)
    assert tuple(drawn[200, 200]) not in ((9, 9, 9), (255, 255, 160))
    area = [(drawn[:, part] != 9).any(-1).sum() for part in (slice(0, 300), slice(500, 800))]
    assert area[1] > 1.5 * area[0] > 0  # the coarser level's is larger


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('attention')
    for name, flags in (('dense', {}), ('sampled', TWO_STAGE)):
        args = SMALL | PREPARED | flags
        torch.save({'model': small(flags).model.state_dict(), 'args': args}, folder / f'{name}.pth')
    write_png(torch.randint(0, 256, (3, 48, 70), dtype=torch.uint8), str(folder / 'image.png'))
    return folder


def words(files: Path, kind: str, *more: str) -> list[str]:
    names = [('--checkpoint', f'{kind}.pth'), ('--source', 'image.png'), ('--output', 'new/out.png')]
    return [word for flag, name in names for word in (flag, str(files / name))] + ['--device', 'cpu', *more]


@pytest.mark.parametrize(
    ('kind', 'more', 'rows', 'columns'),
    [
        pytest.param('sampled', [], 6, 2, marks=pytest.mark.slow),
        ('sampled', ['--num', '1', '--head', 'all', '--layer', '0'], 1, 5),
        ('sampled', ['--queries', '11', '0', '--head', '3', '--layer', '-3'], 2, 2),
        ('dense', ['--num', '2'], 2, 2),
        pytest.param('dense', ['--queries', '4', '--head', 'all'], 1, 5, marks=pytest.mark.slow),
    ],
)
def test_the_tool_draws_a_row_for_each_query(
    files: Path, kind: str, more: list[str], rows: int, columns: int
) -> None:
    main(get_args_parser().parse_args(words(files, kind, *more)))
    drawn = Image.open(files / 'new/out.png')
    height = 288  # of a title and an image of 373 x 256
    assert drawn.size == (columns * PANEL[0], rows * height + LEGEND)
    panels = np.array(drawn)[: rows * height].reshape(rows, height, columns, PANEL[0], 3)
    assert (panels.std(axis=(1, 3, 4)) > 10).all()  # none is empty
    assert len({panels[row, :, column].tobytes() for row in range(rows) for column in range(columns)}) > rows


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--layer', '3'], 'layer 3: choose a number from -3 to 2'),
        (['--layer', '-4'], 'layer -4: choose'),
        (['--head', '4'], '--head 4: choose mean, all or a number from 0 to 3'),
        (['--head', 'x'], '--head x: choose'),
        (['--queries', '12'], '--queries 12: choose best alone, or a number from 0 to 11'),
        (['--queries', 'best', '1'], '--queries best: choose'),
        (['--num', '0'], '--num must be at least 1'),
        (['--output', 'out'], '--output out: let it end in .png'),
        (['--source', 'a.png', '--output', './a.png'], '--output ./a.png is the source'),
        (['--source', 'none.png'], 'none.png'),
        (['--checkpoint', ''], 'give --checkpoint FILE, or --model NAME'),
    ],
)
def test_errors_say_what_is_possible(files: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, get_args_parser(), words(files, 'sampled', *more))
    assert str(stopped.value).startswith('error: ') and message in str(stopped.value)
