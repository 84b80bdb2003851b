"""Checkpoints of official and foreign layouts fill our models, and what does not fit is named."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.weights.layouts import translate
from models.weights.load import load_checkpoint
from models.weights.names import TRANSFORMERS, rename
from models.weights.read import read_checkpoint
from tests.conftest import REASON
from tests.models import SMALL, TWO_STAGE
from tests.rule import fill
from tests.shared_data import SHARED, needs_shared, read_shared
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

FLAGS = {'detr': {}, 'conditional_detr': {'conditional': True}, 'deformable_detr': {'deformable': True}}


def build(**flags: object) -> nn.Module:
    return build_model(Namespace(**{'backbone_weights': 'none'} | flags))[0]


def official_state(system: str, case: str) -> dict[str, Tensor]:
    """A state dict of official names and shapes, all zeros."""
    record = json.loads((SHARED / 'parity' / system / f'{case}.json').read_text())
    return {name: torch.zeros(shape) for name, shape, *_ in record['state_dict']}


@needs_shared
@pytest.mark.parametrize('system', FLAGS)
def test_official_state_dicts_fit_strictly(system: str) -> None:
    model = build(**FLAGS[system])
    state = official_state(system, 'r50')
    # Published files are wrapped and may hold the counters that frozen norms do not have.
    state['backbone.0.body.bn1.num_batches_tracked'] = torch.tensor(0)
    report = load_checkpoint(model, {'model': state})
    assert report.layout == 'official' and not report.reinitialised
    assert report.loaded == len(model.state_dict())
    assert not any(parameter.any() for parameter in model.parameters())


@needs_shared
def test_another_family_is_refused_and_leaves_the_model_alone() -> None:
    model = build()
    before = model.query_embed.weight.clone()
    with pytest.raises(ValueError, match=r'ref_point_head|sa_qcontent') as error:
        load_checkpoint(model, official_state('conditional_detr', 'r50'))
    assert 'missing' in str(error.value) and 'left over' in str(error.value)
    assert torch.equal(before, model.query_embed.weight)


def small(**flags: object) -> nn.Module:
    sizes = {'hidden_dim': 32, 'nheads': 4, 'enc_layers': 1, 'dec_layers': 2, 'dim_feedforward': 64}
    return build(**{'backbone': 'resnet18', 'num_queries': 10} | sizes | flags)


def test_heads_of_another_size_need_pretrained() -> None:
    torch.manual_seed(0)
    source, model = small(num_classes=6), small(num_classes=3, num_queries=12)
    with pytest.raises(ValueError, match='train with --pretrained'):
        load_checkpoint(model, source.state_dict())
    head, queries = model.class_embed.weight.clone(), model.query_embed.weight.clone()
    report = load_checkpoint(model, source.state_dict(), resize=True)
    assert set(report.reinitialised) == {'class_embed.weight', 'class_embed.bias', 'query_embed.weight'}
    assert torch.equal(model.class_embed.weight, head)
    assert torch.equal(model.query_embed.weight[:10], source.query_embed.weight)
    assert torch.equal(model.query_embed.weight[10:], queries[10:])
    assert torch.equal(model.input_proj.weight, source.input_proj.weight)


def test_files_with_a_namespace_of_flags_are_read(tmp_path: Path) -> None:
    """Official training checkpoints hold their argparse flags."""
    torch.save(
        {'model': {'a': torch.ones(2)}, 'args': Namespace(lr=1e-4), 'epoch': 3}, tmp_path / 'official.pth'
    )
    assert read_checkpoint(tmp_path / 'official.pth')['args'].lr == 1e-4


def resnet18(stages: list[str]) -> object:
    transformers = pytest.importorskip('transformers')
    sizes = {'hidden_sizes': [64, 128, 256, 512], 'depths': [2, 2, 2, 2], 'layer_type': 'basic'}
    return transformers.ResNetConfig(**sizes, out_features=stages)


def transformers_model(conditional: bool) -> nn.Module:
    transformers = pytest.importorskip('transformers')
    sizes = {
        'd_model': 256,
        'encoder_layers': 2,
        'decoder_layers': 3,
        'encoder_attention_heads': 8,
        'decoder_attention_heads': 8,
        'encoder_ffn_dim': 128,
        'decoder_ffn_dim': 128,
        'num_labels': 91,
        'use_timm_backbone': False,
        'use_pretrained_backbone': False,
        'backbone_config': resnet18(['stage4']),
    }
    kind = 'ConditionalDetr' if conditional else 'Detr'
    config = getattr(transformers, f'{kind}Config')(**sizes)
    return fill(getattr(transformers, f'{kind}ForObjectDetection')(config)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    'conditional', [False, True], ids=['DetrForObjectDetection', 'ConditionalDetrForObjectDetection']
)
@pytest.mark.parametrize('saved', [False, True], ids=['live names', 'file names'])
def test_transformers_models_give_the_same_detections(conditional: bool, saved: bool, tmp_path: Path) -> None:
    theirs = transformers_model(conditional)
    sizes = {'dim_feedforward': 128, 'num_queries': theirs.config.num_queries}
    check_same_detections(
        theirs, tmp_path if saved else None, 'transformers', 'resnet18', conditional=conditional, **sizes
    )


def check_same_detections(
    theirs: nn.Module, folder: Path | None, layout: str, backbone: str, **flags: object
) -> None:
    """Our model of 2 + 3 layers, loaded from theirs in memory or as saved in `folder`, gives the same boxes."""
    state = theirs.state_dict()
    if folder is not None:
        safetensors = pytest.importorskip('safetensors.torch')
        theirs.save_pretrained(folder)
        state = safetensors.load_file(folder / 'model.safetensors')
    ours = build(backbone=backbone, enc_layers=2, dec_layers=3, **flags).eval()
    assert load_checkpoint(ours, state).layout == layout
    batch = nested_tensor_from_tensor_list([torch.randn(3, 96, 128), torch.randn(3, 128, 64)])
    with torch.no_grad():
        expected = theirs(pixel_values=batch.tensors, pixel_mask=(~batch.mask).long())
        outputs = ours(NestedTensor(batch.tensors, batch.mask))
    torch.testing.assert_close(outputs['pred_logits'], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs['pred_boxes'], expected.pred_boxes, rtol=1e-4, atol=1e-4)


DEFORMABLE_VARIANTS = {
    'plain': {},
    'box refinement': {'with_box_refine': True},
    'two stages': TWO_STAGE,
    'single scale': {'num_feature_levels': 1},
    'single scale, DC5': {'num_feature_levels': 1, 'dilation': True},
}


def transformers_deformable_model(flags: dict) -> nn.Module:
    transformers = pytest.importorskip('transformers')
    sizes = {
        'd_model': 256,
        'encoder_layers': 2,
        'decoder_layers': 3,
        'encoder_ffn_dim': 128,
        'decoder_ffn_dim': 128,
        'num_queries': 50,
        'two_stage_num_proposals': 50,
        'num_labels': 91,
    }
    if flags.get('dilation'):  # only timm's backbone dilates
        backbone = {'use_timm_backbone': True, 'use_pretrained_backbone': False, 'backbone': 'resnet50'}
    else:
        stages = ['stage4'] if flags.get('num_feature_levels') == 1 else ['stage2', 'stage3', 'stage4']
        config = resnet18(stages)
        backbone = {'use_timm_backbone': False, 'use_pretrained_backbone': False, 'backbone_config': config}
    config = transformers.DeformableDetrConfig(**sizes, **backbone, **flags)
    return fill(transformers.DeformableDetrForObjectDetection(config)).eval()


@pytest.mark.slow
@pytest.mark.parametrize('variant', DEFORMABLE_VARIANTS)
@pytest.mark.parametrize('saved', [False, True], ids=['live names', 'file names'])
def test_transformers_deformable_models_give_the_same_detections(
    variant: str, saved: bool, tmp_path: Path, exhaustive: bool
) -> None:
    if not (saved or exhaustive or variant in ('plain', 'two stages')):
        pytest.skip(REASON)
    flags = DEFORMABLE_VARIANTS[variant]
    theirs = transformers_deformable_model(flags)
    sizes = {'deformable': True, 'dim_feedforward': 128, 'num_queries': 50}
    backbone = 'resnet50' if flags.get('dilation') else 'resnet18'
    check_same_detections(theirs, tmp_path if saved else None, 'transformers', backbone, **sizes, **flags)


@needs_shared
@pytest.mark.parametrize('variant', ['two_stage_refine', 'only_in_one_stage'])
def test_published_transformers_names_become_official(variant: str) -> None:
    """Every recorded pair of names, q, k and v of self-attention apart."""
    recorded = read_shared('parity/deformable_detr/transformers_names.json')
    for official, theirs in recorded.get(variant, []):
        ours = rename(theirs, TRANSFORMERS['deformable'], read=True)
        if '[' in official:
            assert ours.startswith(re.sub(r'in_proj_(weight|bias)\[.*', '', official))
        else:
            assert ours == official, theirs
            assert rename(official, TRANSFORMERS['deformable'], read=False) == theirs


def test_names_without_a_row_show_up_as_left_over() -> None:
    assert rename('model.something.new', TRANSFORMERS['detr'], read=True) is None
    assert set(
        translate({'model.something.new': torch.ones(1), 'transformer.level_embeds': torch.ones(1)})[1]
    ) == {
        'model.something.new',
        'transformer.level_embed',
    }


def test_second_class_heads_begin_as_the_first_of_the_file() -> None:
    """MS-DETR's (variant a), fine-tuned from a file without them; for another number of classes both begin anew."""
    flags = SMALL | {'with_box_refine': True}
    plain = build(**flags).state_dict()
    for number, same in ((SMALL['num_classes'], True), (3, False)):
        mixed = build(**flags | {'use_ms_detr': True, 'ms_variant': 'a', 'num_classes': number})
        load_checkpoint(mixed, {'model': plain}, resize=True)
        second = {name: x for name, x in mixed.state_dict().items() if name.startswith('class_embed_o2m')}
        assert second
        for name, value in second.items():
            first = plain[name.replace('class_embed_o2m', 'class_embed')]
            assert (value.shape == first.shape and torch.equal(value, first)) == same, name
