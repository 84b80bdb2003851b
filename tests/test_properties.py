"""What must hold for any boxes, costs, images, checkpoints and annotations (hypothesis)."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from datasets.augmentations import DETRAugmentation
from datasets.coco import CocoDetection
from datasets.targets import Reading
from models.structures import Prediction
from models.training.matcher import OneToManyMatcher, match
from models.weights.read import read_checkpoint
from util.box_ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou
from util.files import save_checkpoint
from util.seeding import local_seed

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
UNIT = st.floats(0, 1, width=32)


@st.composite
def boxes(draw: st.DrawFn, most: int = 6) -> Tensor:
    """Boxes xyxy of any size, in [0, 1], some of no size."""
    corners = draw(hnp.arrays(np.float32, (draw(st.integers(1, most)), 2, 2), elements=UNIT))
    corners.sort(axis=1)
    return torch.from_numpy(corners.reshape(-1, 4)).double()


@ANY
@given(boxes())
def test_box_forms_are_inverse(given_boxes: Tensor) -> None:
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(given_boxes)), given_boxes)


@ANY
@given(boxes(), boxes())
def test_ious_keep_their_bounds(first: Tensor, second: Tensor) -> None:
    """They are symmetric; GIoU is at most IoU, 1 for the same box, and more than -1."""
    iou, union = box_iou(first[:, None], second[None])
    back, _ = box_iou(second[:, None], first[None])
    giou = generalized_box_iou(first[:, None], second[None])
    sizes = (first[:, 2:] - first[:, :2]).prod(1)[:, None] + (second[:, 2:] - second[:, :2]).prod(1)
    sized = union > 1e-12
    torch.testing.assert_close(iou, back.T, equal_nan=True)
    assert ((iou >= 0) & (iou <= 1 + 1e-9))[sized].all()
    assert (union <= sizes + 1e-9).all()
    assert (giou <= iou + 1e-9)[sized].all() and (giou >= -1 - 1e-9)[sized].all()
    own = generalized_box_iou(first, first)
    assert torch.allclose(
        own[(first[:, 2:] - first[:, :2]).prod(1) > 1e-9], torch.ones((), dtype=own.dtype), atol=1e-5
    )


@ANY
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 8), st.integers(0, 10**6))
def test_every_object_gets_a_query_of_the_many(num_objects: int, num_queries: int, k: int, seed: int) -> None:
    """If there are enough queries: at most k each, and pairs exist only once."""
    torch.manual_seed(seed)
    prediction = Prediction(torch.randn(1, 1, num_queries, 4), torch.rand(1, 1, num_queries, 4))
    target = {'labels': torch.randint(0, 3, (num_objects,)), 'boxes': torch.rand(num_objects, 4)}
    (found,) = match(OneToManyMatcher(k), prediction, [target])
    pairs = list(zip(found.query.tolist(), found.target.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= q < num_queries and 0 <= t < num_objects for q, t in pairs)
    assert max((sum(t == each for _, t in pairs) for each in range(num_objects)), default=0) <= k


@ANY
@given(
    size=st.tuples(st.integers(32, 90), st.integers(32, 90)),
    places=boxes(),
    aug=st.sampled_from(['train', 'val']),
    seed=st.integers(0, 10**6),
)
def test_transforms_keep_boxes_labels_and_masks_together(
    size: tuple[int, int], places: Tensor, aug: str, seed: int
) -> None:
    height, width = size
    scaled = (places * torch.tensor([width, height, width, height])).float()
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    sides = torch.tensor([height, width])
    target = {
        'boxes': scaled,
        'labels': torch.arange(len(places)),
        'masks': masks,
        'image_id': torch.tensor([1]),
        'area': torch.ones(len(places)),
        'iscrowd': torch.zeros(len(places), dtype=torch.int64),
        'orig_size': sides,
        'size': sides,
    }
    with local_seed(seed):
        image, seen = DETRAugmentation(64).transforms(aug)(
            torch.zeros(3, height, width, dtype=torch.uint8), target
        )
    assert image.shape[1:] == seen['masks'].shape[1:] == tuple(seen['size'].tolist())
    assert (
        len(seen['boxes'])
        == len(seen['labels'])
        == len(seen['masks'])
        == len(seen['area'])
        == len(seen['iscrowd'])
    )
    corners = box_cxcywh_to_xyxy(seen['boxes'])
    assert ((corners > -1e-4) & (corners < 1 + 1e-4)).all()
    assert (seen['boxes'][:, 2:] >= 0).all()
    assert seen['labels'].tolist() == sorted(set(seen['labels'].tolist()))
    if aug == 'val':
        torch.testing.assert_close(corners, places.float(), atol=1e-4, rtol=0)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
DTYPES = (np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.sampled_from(DTYPES).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    ),
    min_size=1,
    max_size=4,
)


@ANY
@given(weights=TENSORS, rest=st.dictionaries(st.text(max_size=6), PLAIN, max_size=4))
def test_checkpoints_give_back_what_was_saved(tmp_path: Path, weights: dict, rest: dict) -> None:
    saved = rest | {'model': {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}}
    save_checkpoint(tmp_path / 'file.pth', saved)
    found = read_checkpoint(tmp_path / 'file.pth')
    assert {key: value for key, value in found.items() if key != 'model'} == {
        k: v for k, v in saved.items() if k != 'model'
    }
    torch.testing.assert_close(found['model'], saved['model'], rtol=0, atol=0, equal_nan=True)


@st.composite
def annotations(draw: st.DrawFn) -> dict:
    """Up to four images with objects anywhere, in any order."""
    ids = draw(st.lists(st.integers(0, 10**9), min_size=1, max_size=4, unique=True))
    number = st.floats(-50, 150, allow_nan=False).map(lambda value: round(value, 2))
    objects = st.fixed_dictionaries(
        {
            'image_id': st.sampled_from(ids),
            'category_id': st.sampled_from([3, 7, 8]),
            'bbox': st.tuples(number, number, number.map(abs), number.map(abs)).map(list),
        },
        optional={'area': st.floats(0, 1e4), 'iscrowd': st.sampled_from([0, 1])},
    )
    return {
        'images': [{'id': image_id, 'file_name': 'a.png', 'height': 40, 'width': 50} for image_id in ids],
        'annotations': draw(st.lists(objects, max_size=12)),
        'categories': [{'id': 8}, {'id': 3}, {'id': 7}],
    }


@ANY
@given(data=annotations(), drop_tiny=st.booleans())
def test_the_reader_equals_a_plain_loop(tmp_path: Path, data: dict, drop_tiny: bool) -> None:
    PIL.Image.new('RGB', (50, 40)).save(tmp_path / 'a.png')
    (tmp_path / 'data.json').write_text(json.dumps(data))
    dataset = CocoDetection(tmp_path, tmp_path / 'data.json', reading=Reading(drop_tiny=drop_tiny))
    assert dataset.ids == sorted(image['id'] for image in data['images'])
    for image_id, (_, target) in zip(dataset.ids, dataset, strict=True):
        expected = []
        for a in data['annotations']:
            x, y, w, h = a['bbox']
            area = a.get('area', w * h)
            if a['image_id'] != image_id or a.get('iscrowd') or (drop_tiny and (w < 1 or h < 1 or area <= 0)):
                continue
            corner = torch.tensor([x, y, w, h])
            corner[2:] += corner[:2]
            corner[0::2].clamp_(0, 50)
            corner[1::2].clamp_(0, 40)
            if corner[2] > corner[0] and corner[3] > corner[1]:
                expected.append(
                    (corner.tolist(), [3, 7, 8].index(a['category_id']), torch.tensor(area).item())
                )
        found = zip(target['boxes'].tolist(), target['labels'].tolist(), target['area'].tolist(), strict=True)
        assert [tuple(each) for each in found] == expected
