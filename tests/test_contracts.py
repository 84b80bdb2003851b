"""What the parts of the code promise one another is checked where it is first relied on."""

import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch

from datasets import build as data_build
from datasets.class_map import ClassMap
from datasets.image_dataset import ImageDataset
from main import get_args_parser
from models import build_model
from models.backbone import RESNETS, build_backbone
from models.structures import QueryGroup
from tests.models import TWO_STAGE, build
from util.config.flags import AUGMENTATIONS, FLAGS, NO_OPTIONS
from util.config.parser import help_text


@pytest.mark.parametrize('flags', [{}, {'conditional': True}], ids=['detr', 'conditional'])
def test_dense_decoders_refuse_places_that_they_would_not_read(flags: dict) -> None:
    model, _, _ = build(flags)
    memory = model.transformer.encode(
        torch.randn(1, 32, 2, 2), torch.zeros(1, 2, 2) > 0, torch.randn(1, 32, 2, 2)
    )
    placed = QueryGroup('mine', torch.zeros(1, 3, 32), torch.zeros(1, 3, 32), torch.rand(1, 3, 4))
    with pytest.raises(ValueError, match='does not read reference_points, which the query group mine brings'):
        model.transformer.decoder([placed], memory)


@pytest.mark.parametrize(
    ('flags', 'group', 'message'),
    [
        ({}, {'query_pos': torch.zeros(1, 3, 32)}, 'DeformableDecoder needs reference_points'),
        ({}, {'reference_points': torch.rand(1, 3, 4)}, 'DeformableDecoder needs query_pos'),
        (
            {'dino': True},
            {'query_pos': torch.zeros(1, 3, 32), 'reference_points': torch.rand(1, 3, 4)},
            'DinoDecoder does not read query_pos',
        ),
    ],
)
def test_deformable_decoders_say_what_a_group_lacks(flags: dict, group: dict, message: str) -> None:
    model, _, _ = build(TWO_STAGE | flags)
    with pytest.raises(ValueError, match=message):
        model.transformer.decoder([QueryGroup('mine', torch.zeros(1, 3, 32), **group)], None)


class Incomplete(ImageDataset):
    def untransformed(self, idx: int) -> tuple:
        return torch.zeros(3, 8, 8, dtype=torch.uint8), {}

    def image_sizes(self) -> list:
        return [(8, 8)]

    ground_truth = None


def test_a_dataset_that_breaks_the_contract_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are missing, attributes that are not set, a dataset of another kind."""
    module = ModuleType('datasets.mine')
    monkeypatch.setitem(sys.modules, 'datasets.mine', module)
    monkeypatch.setitem(data_build.DATASETS, 'mine', 'datasets.mine')
    flags = vars(data_build.data_settings(Namespace())) | {'dataset_file': 'mine'}
    settings = data_build.DataSettings(**flags)
    for made, message in (
        (lambda *_: ImageDataset(None, None, 0), 'abstract'),
        (lambda *_: Incomplete(None, None, 0), 'Incomplete of datasets.mine lacks ids and class_map'),
        (lambda *_: Namespace(ids=[1], class_map=None), 'is not an ImageDataset'),
    ):
        module.build = made
        with pytest.raises(TypeError, match=message):
            data_build.build_dataset('train', settings)
    complete = Incomplete(None, None, 0)
    complete.ids, complete.class_map = [1], ClassMap((1,), ('thing',))
    module.build = lambda *_: complete
    assert data_build.build_dataset('train', settings) is complete


@pytest.mark.parametrize('term', ['cls', 'bbox', 'giou'])
def test_a_term_of_coefficient_0_does_not_exist(term: str) -> None:
    name = 'ce' if term == 'cls' else term
    flags = TWO_STAGE | {'hybrid_k': 2, 'hybrid_queries': 6, f'{term}_loss_coef': 0}
    model, criterion, _ = build(flags)
    targets = [{'labels': torch.tensor([1]), 'boxes': torch.tensor([[0.5, 0.5, 0.3, 0.3]])}]
    losses = criterion(model.train()(torch.randn(1, 3, 96, 96), targets), targets)
    for names in (criterion.weight_dict, losses):
        assert not [found for found in names if found.startswith(f'loss_{name}')]
        assert len([found for found in names if found.startswith('loss_')]) > 8


def test_help_is_one_screen_and_leads_to_every_flag() -> None:
    parser = get_args_parser()
    short, full = help_text(parser, ''), help_text(parser, 'all')
    assert len(short.splitlines()) <= 60 and '--coco_path' in short and '--dn_number' not in short
    hidden = help_text(parser, 'hidden')
    for name, flag in FLAGS.items():
        shown = flag.command and f'--{flag.option or name}' in (hidden if flag.hidden else full)
        assert shown != (name in NO_OPTIONS or name == 'num_classes'), name
    assert '--hybrid_lambda' in help_text(parser, 'Hybrid') and '--lr_drop' not in help_text(parser, 'Hybrid')
    assert 'these are the groups' in help_text(parser, 'nonsense')
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(['--help', 'matching'])
    assert stop.value.code == 0


@pytest.mark.parametrize('name', ['resnet152', 'resnext50_32x4d', 'wide_resnet50_2'])
def test_every_resnet_of_torchvision_is_a_backbone(name: str) -> None:
    """Stem and first stage are frozen, as in every ResNet."""
    backbone = build_backbone(name, 'none', False, 'frozen', range(2, 5), train=True)
    assert name in RESNETS and backbone.num_channels == [512, 1024, 2048]
    frozen = {name.split('.')[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert 'layer1' in frozen and not frozen & {'layer2', 'layer3', 'layer4'}


def test_a_resnext_trains() -> None:
    flags = {
        'backbone': 'resnext50_32x4d',
        'backbone_weights': 'none',
        'hidden_dim': 32,
        'nheads': 4,
        'enc_layers': 1,
        'dec_layers': 1,
    }
    model, criterion, _ = build_model(Namespace(**flags, dilation=True))
    targets = [{'labels': torch.tensor([1]), 'boxes': torch.tensor([[0.5, 0.5, 0.3, 0.3]])}]
    losses = criterion(model.train()(torch.randn(1, 3, 64, 64), targets), targets)
    losses['loss_bbox'].backward()
    assert model.backbone[0].body.layer4[0].conv2.weight.grad.abs().sum() > 0


def test_help_describes_every_augmentation() -> None:
    text = ' '.join(help_text(get_args_parser(), 'data').split())
    assert '{detr,flip,none,co_detr,lsj}' in text
    assert all(f'{name}: {words}' in text for name, words in AUGMENTATIONS.items())
    assert 'training image with --aug detr or co_detr, pixels' in text
