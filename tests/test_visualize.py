"""Images for people are drawn whatever the model or the log holds, and land on disk whole."""

import csv
import io
import math

import pytest
import torch
from PIL import Image

from util.visualize import (
    MIN_SIDE,
    class_colour,
    class_name,
    contact_sheet,
    draw_boxes,
    plot_curves,
    save_atomically,
    to_number,
)

NAMES = ['disc', 'ring', 'Ärger ★ 猫']


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def objects(boxes, **more):
    return {
        'boxes': torch.tensor(boxes).reshape(-1, 4).float(),
        'labels': torch.arange(len(boxes)) % 3,
        **more,
    }


def test_small_images_are_enlarged_and_large_ones_are_not(image):
    nothing = objects([])
    small = draw_boxes(image, nothing['boxes'], nothing['labels'], NAMES)
    assert small.dtype == torch.uint8 and small.shape == (3, 360, 540) and MIN_SIDE <= 540
    assert torch.equal(small[:, ::6, ::6], image)
    large = image.repeat(1, 10, 10)
    assert torch.equal(draw_boxes(large, nothing['boxes'], nothing['labels'], NAMES), large)


def test_a_box_is_drawn_in_the_colour_of_its_class_around_its_pixels(image):
    truth = objects([[20, 30, 50, 45]])
    drawn = draw_boxes(torch.zeros_like(image), truth['boxes'], truth['labels'], NAMES)
    colour = torch.tensor(class_colour(0), dtype=torch.uint8)
    for y, x in ((30 * 6, 35 * 6), (45 * 6 - 1, 35 * 6), (40 * 6, 20 * 6), (40 * 6, 50 * 6 - 1)):
        assert torch.equal(drawn[:, y, x], colour)
    assert (drawn[:, 35 * 6, 35 * 6] == 0).all()
    drawn = draw_boxes(torch.full_like(image, 255), truth['boxes'], truth['labels'], NAMES)
    for y, x in ((30 * 6 - 1, 48 * 6), (45 * 6, 35 * 6), (40 * 6, 20 * 6 - 1), (40 * 6, 50 * 6)):
        assert (drawn[:, y, x] == 0).all(), 'a black edge shows it on any background'


@pytest.mark.parametrize(
    'box',
    [
        [5, 5, 6, 6],
        [-50, -50, 500, 500],
        [200, 200, 300, 300],
        [-9, -9, -5, -5],
        [8, 8, 2, 2],
        [0, math.nan, 5, math.inf],
    ],
)
def test_strange_boxes_are_drawn(image, box):
    truth = objects([box, [1, 1, 20, 20], [3, 50, 88, 59]])
    masks = torch.zeros(3, 1, 60, 90)
    masks[1, :, 5:9, 5:9] = 1
    scores = torch.tensor([0.3, 1.0, 0.0])
    drawn = draw_boxes(image, truth['boxes'], truth['labels'], NAMES, scores, masks)
    assert drawn.shape == (3, 360, 540)


def test_the_image_given_is_left_as_it_was(image):
    before, large = image.repeat(1, 10, 10), image.repeat(1, 10, 10)
    truth = objects([[5, 5, 400, 400]], masks=torch.ones(1, 600, 900, dtype=torch.bool))
    draw_boxes(large, truth['boxes'], truth['labels'], NAMES, masks=truth['masks'])
    assert torch.equal(large, before)


def test_masks_wash_their_pixels_only(image):
    masks = torch.zeros(1, 60, 90, dtype=torch.bool)
    masks[0, 10:20, 10:20] = True
    truth = objects([[70, 50, 80, 58]])
    plain = draw_boxes(image, truth['boxes'], truth['labels'], NAMES)
    washed = draw_boxes(image, truth['boxes'], truth['labels'], NAMES, masks=masks)
    changed = (plain != washed).any(dim=0)
    assert changed[60:120, 60:120].float().mean() > 0.9 and changed.sum() == changed[60:120, 60:120].sum()


def test_colours_of_classes_differ():
    assert len({class_colour(label) for label in range(91)}) == 91


def test_classes_without_a_name_show_their_number():
    assert class_name(NAMES, 1) == 'ring' and class_name({7: 'cat'}, 7) == 'cat'
    assert class_name(NAMES, 9) == class_name({7: 'cat'}, 9) == class_name([None] * 10, 9) == '9'


@pytest.mark.parametrize(('num', 'size'), [(1, (770, 396)), (3, (1540, 792))])
def test_contact_sheet_has_its_size(tmp_path, image, num, size):
    prediction = objects([[1, 2, 30, 40], [5, 5, 9, 9]], scores=torch.tensor([0.9, 0.1]), query=None)
    nothing = objects([], scores=torch.zeros(0), masks=torch.zeros(0, 60, 90))
    rows = [
        (image, prediction, objects([])),
        (image, nothing, objects([[3, 3, 9, 9]])),
        (image, nothing, nothing),
    ]
    contact_sheet(tmp_path / 'deep' / 'sheet.png', rows[:num], NAMES)
    assert Image.open(tmp_path / 'deep' / 'sheet.png').size == size
    assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['sheet.png']


def test_an_empty_contact_sheet_is_refused(tmp_path):
    with pytest.raises(ValueError, match='at least one'):
        contact_sheet(tmp_path / 'sheet.png', [], NAMES)


@pytest.mark.parametrize(
    'text',
    [
        'epoch,lr,train_loss,train_loss_ce,train_class_error,test_AP,odd\n0,0.0001,5.5,1.2,90,,word\n',
        'epoch,lr,train_loss,train_loss_ce_0,test_AP,test_AP50\n0,0,5,1,,\n1,1e-4,4,0,3.2,nan\n2,1e-4,3\n',
        'epoch,lr,train_loss\n',
        'train_loss\n3\n2\n',
        '',
    ],
)
def test_curves_are_drawn_of_whatever_was_logged(tmp_path, text):
    plot_curves(tmp_path / 'curves.png', list(csv.DictReader(io.StringIO(text))))
    assert Image.open(tmp_path / 'curves.png').size == (1210, 770)
    assert len(list(tmp_path.iterdir())) == 1


def test_cells_without_a_number_are_nan():
    assert [to_number(cell) for cell in ('0.5', 3, 0)] == [0.5, 3, 0]
    assert all(math.isnan(to_number(cell)) for cell in ('', None, 'none', math.nan))


def test_a_failed_drawing_leaves_the_old_file(tmp_path):
    path = tmp_path / 'curves.png'
    path.write_text('old')

    def fail(partial):
        partial.write_text('half')
        raise RuntimeError('disk full')

    with pytest.raises(RuntimeError):
        save_atomically(path, fail)
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
