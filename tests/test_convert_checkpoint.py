"""Checkpoints between projects, and without what only training needs."""

import re
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import build_detector, build_model
from models.detector import load_detector
from models.weights.layouts import COCO_IDS, to_mmdetection, translate
from models.weights.load import load_checkpoint
from models.weights.read import read_checkpoint
from tests.models import HEADS, SMALL, TRICKS
from tests.runs import fill_disk
from tools import convert_checkpoint
from tools.convert_checkpoint import convert
from util.command_line import run_command
from util.config.settle import settle
from util.nested_tensor import NestedTensor

CO_DEFORMABLE, CO_DINO = TRICKS | HEADS, {'dino': True, 'dn_number': 10} | HEADS


def build(flags: dict, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(Namespace(**SMALL | flags | more))[0]
    with torch.no_grad():  # no two entries alike
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(1e-5 * index)
    return model


def official_file(model: nn.Module, path: Path) -> Path:
    state = to_mmdetection(model.state_dict())
    torch.save({'meta': {'epoch': 12}, 'state_dict': state, 'optimizer': {}}, path)
    return path


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize('flags', [CO_DEFORMABLE, CO_DINO], ids=['Co-Deformable', 'Co-DINO'])
def test_mmdetection_and_back(flags: dict, tmp_path: Path) -> None:
    model, other = build(flags), build(flags)
    path = official_file(model, tmp_path / 'epoch_12.pth')
    for parameter in other.parameters():
        nn.init.constant_(parameter, 7.0)
    report = load_checkpoint(other, path)
    assert report.layout == 'mmdetection' and not report.reinitialised
    assert same(model.state_dict(), other.state_dict())
    print_line = convert(str(path), tmp_path / 'ours.pth', stripped=False, to='ours')
    assert 'mmdetection names to ours' in print_line
    assert same(read_checkpoint(tmp_path / 'ours.pth')['model'], model.state_dict())
    convert(str(tmp_path / 'ours.pth'), tmp_path / 'theirs.pth', stripped=False, to='mmdet')
    assert same(read_checkpoint(tmp_path / 'theirs.pth')['state_dict'], read_checkpoint(path)['state_dict'])


def test_averaged_weights_and_the_newer_port_are_read() -> None:
    model = build(CO_DINO)
    state = to_mmdetection(model.state_dict())
    port = {
        name.replace('query_head.label_embedding', 'query_head.dn_generator.label_embedding'): value
        for name, value in state.items()
    }
    averaged = {f'ema_{name.replace(".", "_")}': value + 1 for name, value in state.items()}
    for variant in (port, state | averaged):
        assert same(translate(variant)[1], model.state_dict())


def test_a_stripped_file_is_the_plain_model(tmp_path: Path) -> None:
    """Training's queries and heads are gone, and the flags say so; detections are the same."""
    flags = SMALL | CO_DEFORMABLE | {'hybrid_k': 2, 'hybrid_queries': 24, 'dn_number': 10}
    model = build(flags)
    args = vars(settle(Namespace(**flags)))
    torch.save({'model': model.state_dict(), 'args': args, 'optimizer': {}}, tmp_path / 'run.pth')
    convert(str(tmp_path / 'run.pth'), tmp_path / 'small.pth', stripped=True, to='ours')
    stripped = read_checkpoint(tmp_path / 'small.pth')
    assert not [name for name in stripped['model'] if name.startswith('query_sources')]
    assert set(stripped) == {'model', 'args'} and len(stripped['model']['query_embed.weight']) == 12
    plain, _, _ = build_model(Namespace(**stripped['args'] | {'backbone_weights': 'none'}))
    assert not list(plain.query_sources) and list(plain.num_queries) == ['one2one']
    load_checkpoint(plain, stripped)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = plain.eval()(images), model.eval()(images)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_is_overwritten_or_dropped_silently(tmp_path: Path) -> None:
    model = build(CO_DEFORMABLE | {'use_ms_detr': True, 'use_aux_ffn': True})
    torch.save({'model': model.state_dict()}, tmp_path / 'run.pth')
    with pytest.raises(ValueError, match=r'no place for 18 entries, such as .*linear3'):
        convert(str(tmp_path / 'run.pth'), tmp_path / 'theirs.pth', stripped=False, to='mmdet')
    assert not (tmp_path / 'theirs.pth').exists()
    with pytest.raises(ValueError, match='exists: choose another name'):
        convert(str(tmp_path / 'run.pth'), tmp_path / 'run.pth', stripped=True, to='ours')


def test_projections_without_biases_fit_those_with_biases() -> None:
    """A bias of zero is as good as none; the other way round something would be lost."""
    heads = build(CO_DEFORMABLE)
    plain = build(TRICKS)
    load_checkpoint(plain, heads.state_dict())
    assert all(not project[0].bias.any() for project in plain.input_proj)
    nn.init.ones_(plain.input_proj[0][0].bias)
    with pytest.raises(ValueError, match=r'left over: 4, such as input_proj\.0\.0\.bias'):
        load_checkpoint(heads, plain.state_dict())


def test_heads_that_detect_must_be_in_the_file() -> None:
    judged = build(CO_DEFORMABLE, eval_module='atss')
    plain = build(TRICKS, input_proj_bias=False)
    with pytest.raises(ValueError, match=r'missing: \d+, such as query_sources\.collaborative'):
        load_checkpoint(judged, plain.state_dict())
    judged.eval_module = None
    load_checkpoint(judged, plain.state_dict())
    with pytest.raises(ValueError, match=r'missing: \d+, such as query_sources\.collaborative'):
        load_checkpoint(judged, plain.state_dict(), resume=True)


@pytest.mark.parametrize('flags', [CO_DEFORMABLE, CO_DINO], ids=['Co-Deformable', 'Co-DINO'])
def test_80_classes_go_to_their_coco_ids(flags: dict) -> None:
    """Detection heads have a row a COCO id; the proposals' class 0 stands for 'object', but in DINO."""
    small = build(flags, num_classes=80)
    args = settle(Namespace(**SMALL | flags | {'num_classes': 91, 'co_aux_heads': [], 'dn_number': 0}))
    large = build_detector(args, {'one2one': 12})
    load_checkpoint(large, {'state_dict': to_mmdetection(small.state_dict())})
    last = len(large.class_embed) - 1
    for index, (ours, theirs) in enumerate(zip(large.class_embed, small.class_embed, strict=True)):
        rows = list(range(80)) if index == last and 'dino' not in flags else COCO_IDS
        assert torch.equal(ours.weight[rows], theirs.weight)
        others = [row for row in range(91) if row not in rows]
        assert (ours.bias[others] < -20).all()


@pytest.mark.parametrize('order', [['atss', 'faster_rcnn'], ['atss']], ids='+'.join)
@pytest.mark.parametrize('flags', [CO_DEFORMABLE, CO_DINO], ids=['Co-Deformable', 'Co-DINO'])
def test_heads_are_known_by_name(flags: dict, order: list[str]) -> None:
    """Whatever their order and number here."""
    both = build(flags)
    some = build(flags | {'co_aux_heads': order})
    load_checkpoint(some, {'state_dict': to_mmdetection(both.state_dict())})
    theirs = both.state_dict()
    for name, value in some.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert not any(re.search('faster_rcnn', name) for name in some.state_dict()) or 'faster_rcnn' in order


@pytest.mark.parametrize('foreign', [False, True], ids=['ours', 'mmdetection'])
def test_heads_of_another_class_count(foreign: bool) -> None:
    """Fine-tuning starts them anew and says so; they do not matter where the decoder detects."""
    trained = build(CO_DINO, num_classes=80)
    state = {'state_dict': to_mmdetection(trained.state_dict())} if foreign else trained.state_dict()
    tuned = build(CO_DINO, num_classes=7)
    report = load_checkpoint(tuned, state, resize=True)
    heads = [name for name in report.reinitialised if name.startswith('query_sources')]
    assert {name.split('.')[-2] for name in heads} == {'label_embedding', 'fc_cls', 'fc_reg', 'atss_cls'}
    assert torch.equal(tuned.bbox_embed[0].layers[0].weight, trained.bbox_embed[0].layers[0].weight)
    with pytest.raises(ValueError, match=r'(?s)class_embed.*--class_ids'):
        load_checkpoint(tuned, state)
    if foreign:
        report = load_checkpoint(build(CO_DINO, num_classes=91), state)
        assert report.reinitialised == heads
        judged = build(CO_DINO, num_classes=91, eval_module='atss')
        with pytest.raises(ValueError, match=r'(?s)label_embedding.*--class_ids'):
            load_checkpoint(judged, state)


TRANSFORMERS = {
    'detr': {},
    'detr, DC5': {'dilation': True},
    'conditional': {'conditional': True},
    'deformable': {'deformable': True},
    'box refinement': {'with_box_refine': True},
    'two stages': {'with_box_refine': True, 'two_stage': True},
    'one level': {'num_feature_levels': 1},
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', TRANSFORMERS)
def test_transformers_opens_what_is_written_for_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('timm')
    flags = SMALL | {
        'backbone': 'resnet18' if kind != 'detr, DC5' else 'resnet50',
        'backbone_stages': 4,
        'hidden_dim': 256,
        'num_classes': 91,
    }
    flags |= TRANSFORMERS[kind]
    args = settle(Namespace(**flags))
    torch.manual_seed(0)
    model = build_detector(args, {'one2one': args.num_queries}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim == 2 else None
    torch.save({'model': model.state_dict(), 'args': vars(args)}, tmp_path / 'run.pth')
    convert(str(tmp_path / 'run.pth'), tmp_path / 'theirs', stripped=False, to='transformers')
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / 'theirs').eval()
    assert theirs.config.id2label[18] == 'dog'
    images, mask = torch.randn(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~mask).long())
        found = (
            model(NestedTensor(images, mask)),
            load_detector(weights=tmp_path / 'theirs').model(NestedTensor(images, mask)),
        )
    for outputs in found:
        torch.testing.assert_close(outputs['pred_logits'], expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs['pred_boxes'], expected.pred_boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (TRICKS | {'backbone': 'resnet18'}, 'no detector of --mixed_selection True'),
        ({'backbone': 'swin_tiny', 'deformable': True}, 'no detector of --backbone swin_tiny'),
        ({'backbone': 'resnet18', 'pre_norm': True}, 'no detector of --pre_norm True'),
        ({'backbone': 'resnet18', 'pe_temperature': 20}, 'no detector of --pe_temperature 20'),
    ],
)
def test_transformers_has_no_place_for_others(flags: dict, message: str, tmp_path: Path) -> None:
    flags = {'backbone_stages': 4} | flags
    torch.save({'model': build({}).state_dict(), 'args': SMALL | flags}, tmp_path / 'run.pth')
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / 'run.pth'), tmp_path / 'theirs', stripped=False, to='transformers')
    torch.save(build({}).state_dict(), tmp_path / 'alone.pth')
    with pytest.raises(ValueError, match=r'records no flags .* \(--model NAME\)'):
        convert(str(tmp_path / 'alone.pth'), tmp_path / 'theirs', stripped=False, to='transformers')
    assert not (tmp_path / 'theirs').exists()


@pytest.mark.parametrize(
    ('flags', 'aliases'),
    [
        ({'deformable': True}, 0),
        ({'with_box_refine': True}, 3 * 6),
        (TRICKS, 4 * 8),
        ({'with_box_refine': True, 'use_ms_detr': True, 'ms_variant': 'a'}, 2 * 3 * 6),
        ({'conditional': True}, 0),
    ],
)
def test_official_files_have_their_second_names(flags: dict, aliases: int, tmp_path: Path) -> None:
    model = build(flags)
    torch.save({'model': model.state_dict()}, tmp_path / 'ours.pth')
    convert(str(tmp_path / 'ours.pth'), tmp_path / 'theirs.safetensors', stripped=False, to='official')
    state = read_checkpoint(tmp_path / 'theirs.safetensors')['model']
    assert len(state) == len(model.state_dict()) + aliases
    assert same(translate(state)[1], model.state_dict())
    if aliases:
        name = 'transformer.decoder.bbox_embed.1.layers.2.bias'
        assert torch.equal(state[name], model.bbox_embed[1].layers[2].bias)


@pytest.mark.parametrize('disk', ['full', 'read-only'])
@pytest.mark.parametrize('out', ['out.pth', 'out.safetensors'])
def test_a_disk_that_takes_nothing_is_told_in_a_sentence(
    out: str, disk: str, small_disk: Path, tmp_path: Path
) -> None:
    torch.save({'model': build({}).state_dict()}, tmp_path / 'ours.pth')
    fill_disk(small_disk)
    if disk == 'read-only':
        subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    words = [str(tmp_path / 'ours.pth'), str(small_disk / out)]
    with pytest.raises(SystemExit, match=rf'error: .*{out} could not be written') as stop:
        run_command(convert_checkpoint.main, convert_checkpoint.get_args_parser(), words)
    assert len(stop.value.code.splitlines()) == 1
    assert [path.name for path in small_disk.iterdir()] == ['filler']


def test_official_code_has_no_place_for_co_detr(tmp_path: Path) -> None:
    model = build(CO_DEFORMABLE)
    torch.save({'model': model.state_dict()}, tmp_path / 'ours.pth')
    with pytest.raises(ValueError, match=r'DETR family has no place for .* query_sources'):
        convert(str(tmp_path / 'ours.pth'), tmp_path / 'theirs.pth', stripped=False, to='official')
    convert(str(tmp_path / 'ours.pth'), tmp_path / 'theirs.pth', stripped=True, to='official')
    state = read_checkpoint(tmp_path / 'theirs.pth')['model']
    assert not state['input_proj.0.0.bias'].any(), 'official projections have biases'
    load_checkpoint(build(TRICKS), state)
    torch.save({'model': build({'dino': True}).state_dict()}, tmp_path / 'dino.pth')
    with pytest.raises(ValueError, match=r'such as transformer\.decoder\.ref_point_head'):
        convert(str(tmp_path / 'dino.pth'), tmp_path / 'no.pth', stripped=False, to='official')


def test_dinos_own_names_are_read() -> None:
    """Those of IDEA-Research: content of queries, heads of proposals and labels of denoising are elsewhere."""
    model = build({'dino': True, 'dn_number': 10, 'input_proj_bias': True})
    theirs = {}
    for name, value in model.state_dict().items():
        name = name.replace('query_embed.', 'transformer.tgt_embed.')
        name = name.replace('query_sources.denoising.label_embedding', 'label_enc')
        name = re.sub(r'^(class|bbox)_embed\.3\.', r'transformer.enc_out_\1_embed.', name)
        theirs[name] = value
    theirs |= {
        f'transformer.decoder.{name}': x
        for name, x in theirs.items()
        if re.match(r'(class|bbox)_embed', name)
    }
    layout, state = translate(theirs)
    assert layout == 'IDEA DINO' and same(state, model.state_dict())
    plain = build({'dino': True, 'input_proj_bias': True})
    assert load_checkpoint(plain, {'model': theirs}).layout == 'IDEA DINO'
