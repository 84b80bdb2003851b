"""Rows of the model zoos: published counts, hub entries, and weights of any layout through every door."""

import functools
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import main
from models import build_detector, build_model, hub
from models.backbone import build_backbone
from models.detector import Detector, load_detector
from models.weights.layouts import to_mmdetection, to_official_files
from models.weights.load import load_checkpoint
from models.weights.write import write_safetensors
from tests import rule, zoo_table
from tests.models import HEADS, SMALL, TRICKS
from tests.parity import assert_close, float64
from tests.runs import ROOT, load, parse, run
from tests.shared_data import SHARED, needs_shared
from tests.zoo_table import counts, table
from tools import predict
from tools.convert_checkpoint import convert
from util.config import recipes
from util.config.recipes import ZOO, Row, find_row
from util.config.recorded import settle_recorded
from util.nested_tensor import NestedTensor

PUBLISHED = [row for row in ZOO if row.size]
# Of ResNet-101 and of Conditional DETR's dilation nothing is new; test_scripts.py counts their parameters.
REPEATED = re.compile(r'r(esnet)?101|conditional_detr_resnet50_dc5')
# Published GFLOPs of Deformable DETR with one level fit an image that is 3 % smaller than all others'; and
# the table has one number for all with four levels, though the heads that choose proposals in two stages cost
# 1.4 more.
SIZES = {'num_feature_levels': (800, 1104)}
MORE = {'two_stage': 1.4}


@cache
def counted(network: str) -> tuple[int, float]:
    row = next(row for row in ZOO if row.network == network)
    return counts(row, *next((size for flag, size in SIZES.items() if flag in network), (800, 1136)))


@pytest.mark.slow
@pytest.mark.parametrize(
    'row',
    [
        pytest.param(
            row,
            id=row.name or row.script,
            marks=pytest.mark.exhaustive if REPEATED.search(row.name or row.script) else (),
        )
        for row in PUBLISHED
    ],
)
def test_counts_are_the_published(row: Row) -> None:
    parameters, gflops = counted(row.network)
    assert parameters / 1e6 == pytest.approx(row.size[0], rel=0.02)
    gflops -= sum(more for flag, more in MORE.items() if flag in row.network)
    assert gflops == pytest.approx(row.size[1], rel=0.02)


@pytest.mark.slow
def test_every_entry_builds_without_network(monkeypatch: pytest.MonkeyPatch, exhaustive: bool) -> None:
    """One network of each scheme (with --exhaustive each network) is built, without memory; weights that have an
    address are asked for there. test_scripts.py builds all networks as they are trained.
    """

    def kind(row: Row) -> str:
        sizes = r"\('(backbone|drop_path_rate|num_queries|img_size|enc_layers)', [^)]*\)(, )?"
        return row.network if exhaustive else re.sub(sizes, '', row.network)

    asked, build = [], functools.cache(lambda name: zoo_build(find_row(name)))
    first = {kind(row): row.name for row in reversed(ZOO) if row.name}
    zoo_build = hub.build_row
    monkeypatch.setattr(hub, 'build_row', lambda row, *_: build(first[kind(row)]))
    monkeypatch.setattr(hub, 'load_checkpoint', note_source(asked))
    built = set()
    for row in ZOO:
        if not row.name:
            continue
        if row.weights or kind(row) not in built:
            with torch.device('meta'):
                model = hub.entries()[row.name](weights=row.weights or 'by hand')
            built.add(kind(row))
            assert list(model.num_queries) == ['one2one'] and not list(model.query_sources)
        if not row.weights:
            with pytest.raises(
                ValueError, match=r'no direct address: fetch them by hand from .*weights=PATH'
            ):
                hub.entries()[row.name](pretrained=True)
    direct = [source for source in asked if source != 'by hand']
    assert direct == [row.weights for row in ZOO if row.weights] and len(set(direct)) == len(direct)


def note_source(asked: list) -> object:
    def load_nothing(model: nn.Module, source: str, resize: bool) -> Namespace:
        asked.append(source)
        return Namespace(reinitialised=[])

    return load_nothing


def test_hub_entries_are_the_rows() -> None:
    names = [row.name for row in ZOO if row.name]
    assert set(hub.entries()) == {*names, 'detector'} and len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"no model 'detr_resnet5' is known: did you mean detr_resnet50 or "):
        find_row('detr_resnet5')


def test_every_direct_address_is_that_of_a_row() -> None:
    """But second copies of the same weights, and files that only repeat a row."""
    listed = SHARED / 'zoo_addresses.md'
    if not listed.is_file():
        pytest.skip('needs the folder shared/ beside the checkout')
    known = {row.weights for row in ZOO}
    missing = set(re.findall(r'https://github.com/HDETR\S+\.pth', listed.read_text())) - known
    assert not missing


def test_the_table_in_docs_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what takes long to count."""
    monkeypatch.setattr(zoo_table, 'counts', lambda row: (0, 0.0))
    docs = (ROOT / 'docs/zoo.md').read_text()
    ours, theirs = (
        [[*cells[:4], *cells[6:]] for line in text.splitlines() if len(cells := line.split('|')) == 10]
        for text in (table(), docs)
    )
    assert ours == theirs and len(ours) == len(ZOO) + 2


def test_the_table_counts_a_network_with_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of COCO's classes and of LVIS's has counts of its own, and rows of one network share them."""
    asked: list[Row] = []
    monkeypatch.setattr(zoo_table, 'counts', lambda row: asked.append(row) or (0, 0.0))
    table()
    assert {1203, 91, 250} == {row.classes for row in asked} and len({row.network for row in asked}) == len(
        asked
    )
    docs = [
        line.split(' | ') for line in (ROOT / 'docs/zoo.md').read_text().splitlines() if line.count('|') == 9
    ]
    found = {cells[5].strip('`') or cells[6].strip('`'): (cells[3], cells[4]) for cells in docs}
    first: dict[str, tuple[str, str]] = {}
    for row in ZOO:
        counted = found[row.name or row.script]
        assert first.setdefault(row.network, counted) == counted, row.name
    lvis = [row for row in ZOO if row.name.endswith('resnet50_lvis')]
    assert [found[row.name] for row in lvis] == [count_text(row) for row in lvis]


def count_text(row: Row) -> tuple[str, str]:
    parameters, gflops = counts(row)
    return f'{parameters / 1e6:.1f}', f'{gflops:.0f}'


def small_row_of(flags: dict) -> Row:
    words = []
    for name, value in flags.items():
        if value is not False and name != 'num_classes':
            words += [
                f'--{name}',
                *map(str, () if value is True else value if isinstance(value, list) else [value]),
            ]
    return Row('small', '', title='small', flags=' '.join(words), epochs=1)


@pytest.fixture
def small_row(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A row of a small model among the others, and of the classes of a run of the tests."""
    flags = {name: value for name, value in SMALL.items() if name not in ('num_classes', 'backbone_weights')}
    row = small_row_of(flags | {'conditional': True, 'img_size': 64})
    monkeypatch.setattr(recipes, 'ZOO', [*ZOO, row])
    return row


def small_model(row: Row, num_classes: int = 91) -> nn.Module:
    torch.manual_seed(0)
    return hub.build_row(row, num_classes)[0].eval()


def test_named_boxes_come_from_an_image_in_three_lines(small_row: Row, tmp_path: Path) -> None:
    model = small_model(small_row)
    nn.init.constant_(model.class_embed.bias, -5)
    model.class_embed.bias.data[18] = 3  # a dog, wherever one looks
    torch.save(model.state_dict(), tmp_path / 'alone.pth')
    detect = hub.detector('small', weights=tmp_path / 'alone.pth', device='cpu')
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    objects = detect(image)
    assert isinstance(detect, Detector) and {found['name'] for found in objects} == {'dog'}
    assert all(0.9 < found['score'] < 1 and len(found['box']) == 4 for found in objects)
    assert not detect(image, score_threshold=0.99)


def test_other_classes_start_anew_and_that_is_said(
    small_row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(small_row)
    torch.save(model.state_dict(), tmp_path / 'alone.pth')
    tuned = hub.build(small_row, num_classes=7, weights=tmp_path / 'alone.pth')
    assert tuned.class_embed.out_features == 7
    assert torch.equal(tuned.bbox_embed.layers[0].weight, model.bbox_embed.layers[0].weight)
    assert (
        'small with 7 classes' in (said := capsys.readouterr().out) and 're-initialised: class_embed' in said
    )


def test_a_name_stands_for_model_and_weights(
    small_row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In main.py to evaluate and to train, and in predict.py."""
    file, out = tmp_path / 'alone.pth', tmp_path / 'out'
    torch.save(small_model(small_row, 6).state_dict(), file)
    monkeypatch.setattr(Row, 'source', lambda row: str(file))
    data = """--dataset_file shapes --shapes_train 4 --shapes_val 2 --shapes_size 64 --img_size 64
        --batch_size 2 --num_workers 0 --device cpu --epochs 1 --backbone_weights none --model
        small"""
    run(out / 'eval', '--eval', flags=data)
    assert len(json.loads((out / 'eval/eval.json').read_text())['test_coco_eval_bbox']) == 12
    assert 'no flags in the file' in capsys.readouterr().out
    run(out / 'train', flags=data)
    args = load(out / 'train')['args']
    assert (args['hidden_dim'], args['family'], args['pretrained']) == (32, 'conditional', str(file))
    run(out / 'auto', '--resume', 'auto', flags=data)
    assert load(out / 'auto')['args']['pretrained'] == str(file), 'a first run has nothing to resume'
    with pytest.raises(ValueError, match=r'--nheads 8 contradicts .* trained with 4'):
        run(out / 'other', '--eval', '--nheads', '8', flags=data)
    image = next(ROOT.glob('docs/*.jpg'))
    flags = [
        '--model',
        'small',
        '--source',
        str(image),
        '--output_dir',
        str(out / 'drawn'),
        '--device',
        'cpu',
    ]
    predict.main(predict.get_args_parser().parse_args(flags))
    assert (out / 'drawn/predictions.json').is_file()
    with pytest.raises(ValueError, match='give --checkpoint FILE, or --model NAME'):
        predict.main(predict.get_args_parser().parse_args(flags[2:]))
    with pytest.raises(ValueError, match=r'holds weights alone, without the flags .*--model NAME'):
        load_detector(weights=file)


def detections(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 64, 96, generator=generator, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return model.eval()(NestedTensor(images, torch.zeros(1, 64, 96, dtype=torch.bool)))


def layouts(model: nn.Module, flags: dict, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of one detector in every layout that we can write."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    args = vars(settle_recorded(flags))
    contents = {
        'ours': {'model': state, 'args': args},
        'alone': state,
        'DDP': {f'module.{k}': v for k, v in state.items()},
    }
    if 'co_aux_heads' in flags:
        theirs = to_mmdetection(state)
        averaged = {f'ema_{name.replace(".", "_")}': value + 1 for name, value in theirs.items()}
        contents['mmdetection 2'] = {'meta': {'CLASSES': ('a',)}, 'state_dict': theirs, 'optimizer': {}}
        contents['mmdetection, EMA'] = {'meta': {}, 'state_dict': theirs | averaged}
        dn = {
            name.replace('query_head.label_emb', 'query_head.dn_generator.label_emb'): x
            for name, x in theirs.items()
        }
        contents['mmdetection 3'] = {'meta': {}, 'state_dict': dn, 'message_hub': {}, 'param_schedulers': []}
    else:
        contents['official'] = {'model': to_official_files(state), 'args': Namespace(**flags), 'epoch': 49}
    for layout, content in contents.items():
        path = folder / f'{layout}.pth'
        torch.save(content, path)
        yield layout, path
    write_safetensors(folder / 'ours.safetensors', {'model': state, 'args': {'nheads': flags['nheads']}})
    yield 'safetensors', folder / 'ours.safetensors'


CO_DINO = HEADS | {'dino': True, 'dn_number': 10}
MARKS = dict.fromkeys(('tricks', 'co_dino'), pytest.mark.slow)
DETECTORS = {
    'conditional': {'conditional': True},
    'refine': {'with_box_refine': True},
    'tricks': TRICKS,
    'co_dino': CO_DINO,
}


@pytest.mark.parametrize(
    'kind', [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.exhaustive)) for kind in DETECTORS]
)
def test_every_door_takes_every_layout(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub, predict, --eval, --pretrained and convert give the detections of the model that was saved."""
    flags = SMALL | {'num_classes': 91} | DETECTORS[kind]
    row = small_row_of(flags)
    monkeypatch.setattr(recipes, 'ZOO', [*ZOO, row])
    torch.manual_seed(0)
    trained = build_model(Namespace(**flags))[0]
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    expected = detections(trained)
    for layout, path in layouts(trained, flags, tmp_path):
        doors = {
            'hub': hub.build(row, weights=path),
            'predict': load_detector('small', path).model,
            'convert': converted(path, tmp_path / f'converted {layout}.pth', flags),
            '--eval': through_main(monkeypatch, 'eval', path, flags, trained),
            '--pretrained': through_main(monkeypatch, 'pretrained', path, flags, trained),
        }
        if layout in ('ours', 'official'):
            doors['predict, flags from the file'] = load_detector(weights=path).model
        for door, model in doors.items():
            found = detections(model)
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name], value, rtol=1e-6, atol=1e-6, msg=f'{layout}, {door}, {name}'
                )


def converted(path: Path, output: Path, flags: dict) -> nn.Module:
    convert(str(path), output, stripped=True, to='ours')
    args = settle_recorded(flags)
    model = build_detector(args, {'one2one': args.num_queries})
    load_checkpoint(model, output)
    return model


def through_main(
    monkeypatch: pytest.MonkeyPatch, how: str, path: Path, flags: dict, trained: nn.Module
) -> nn.Module:
    """The model that main.py evaluates or begins to train with."""
    seen = []

    def load_and_note(model: nn.Module, *given: object, **more: object) -> object:
        seen.append(model)
        return load_checkpoint(model, *given, **more)

    monkeypatch.setattr(main, 'load_checkpoint', load_and_note)
    monkeypatch.setattr(main, 'evaluate_alone', stop)
    monkeypatch.setattr(main, 'train', stop)
    data = """--dataset_file shapes --shapes_train 2 --shapes_val 2 --shapes_size 128 --img_size 128
        --num_workers 0 --device cpu"""
    words = []
    for flag, value in flags.items():
        if flag not in ('num_classes', 'backbone_weights', 'dn_number'):
            words += [
                f'--{flag}',
                *([] if value is True else map(str, value if isinstance(value, list) else [value])),
            ]
    monkeypatch.setattr(main, 'build_model', with_classes(flags['num_classes']))
    more = ['--eval', '--resume', str(path)] if how == 'eval' else ['--pretrained', str(path)]
    args = parse('', *words, *more, flags=data)
    with pytest.raises(Stopped):
        main.main(args)
    return seen[0]


class Program:
    """An object whose pickle would make a file when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return exec, (f'open({str(self.proof)!r}, "w").close()',)


def test_no_door_runs_what_a_file_holds(
    small_row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside good weights it is left out and named; alone it is refused."""
    proof, good, bad = tmp_path / 'proof', tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save({'model': small_model(small_row, 6).state_dict(), 'more': Program(proof)}, good)
    torch.save(Program(proof), bad)
    data = """--dataset_file shapes --shapes_train 4 --shapes_val 2 --shapes_size 64 --img_size 64
        --batch_size 2 --num_workers 0 --device cpu --epochs 1 --backbone_weights none --model
        small"""
    doors = {
        'hub': lambda file: hub.build(small_row, num_classes=6, weights=file),
        'predict': lambda file: load_detector('small', file),
        'convert': lambda file: convert(str(file), tmp_path / f'{file.stem}2.pth', stripped=False, to='ours'),
        '--eval': lambda file: run('', '--eval', '--resume', str(file), flags=data),
        '--pretrained': lambda file: run('', '--pretrained', str(file), flags=data),
        '--backbone_weights': lambda file: build_backbone(
            'resnet10', str(file), False, 'frozen', range(4, 5), True
        ),
    }
    for door, read in doors.items():
        if door != '--backbone_weights':
            read(good)
            assert 'nothing of that was run' in capsys.readouterr().out, door
        with pytest.raises(ValueError, match='nothing of that was run'):
            read(bad)
        assert not proof.exists(), door


class Stopped(Exception): ...


def stop(*arguments: object) -> None:
    raise Stopped


def with_classes(number: int) -> object:
    return lambda args: build_model(Namespace(**vars(args) | {'num_classes': number}))


@needs_shared
@pytest.mark.slow
def test_detrex_files_fit_the_hub_and_predict(tmp_path: Path) -> None:
    """Their second group of queries is left out, and their 80 classes go to COCO's ids."""
    record = json.loads((SHARED / 'parity/h_deformable_detr/detrex_r50_60_120_k3.json').read_text())
    state = {
        name: torch.from_numpy(rule.parameter(name, tuple(shape))).float()
        for name, shape in record['state_dict']
    }
    state['query_embedding.weight'] = torch.randn(1800, 256)
    torch.save({'model': state, 'trainer': {}, 'iteration': 9}, tmp_path / 'detrex.pth')
    model = hub.entries()['h_deformable_detr_resnet50'](weights=tmp_path / 'detrex.pth')
    assert torch.equal(model.query_embed.weight, state['query_embedding.weight'][:300])
    detector = load_detector('h_deformable_detr_resnet50', tmp_path / 'detrex.pth')
    assert torch.equal(detector.model.class_embed[0].weight[1], state['class_embed.0.weight'][0])
    assert detector.class_map.names[90] == 'toothbrush'


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ('system', 'case', 'entry'),
    [
        ('detr', 'r50_dc5', 'detr_resnet50_dc5'),
        pytest.param('conditional_detr', 'r50', 'conditional_detr_resnet50', marks=pytest.mark.exhaustive),
        pytest.param(
            'deformable_detr',
            'r50_box_refine',
            'deformable_detr_resnet50_box_refine',
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_hub_gives_recorded_outputs_for_official_files(
    system: str, case: str, entry: str, tmp_path: Path
) -> None:
    """Weights by the recorded names, in a file with the official flags."""
    path = SHARED / f'parity/{system}/{case}.json'
    record = json.loads(path.read_text())
    state = {}
    for name, shape, *first in record['state_dict']:
        state[name] = torch.from_numpy(
            rule.parameter(record['rule']['salt'] + (first or [name])[0], tuple(shape))
        )
    for step in record['rule'].get('after_fill', []):
        state[step['parameter']] *= step['multiply_in_place_by']
    flags = Namespace(**record.get('args') or record['arguments'])
    torch.save({'model': state, 'args': flags, 'epoch': 49}, tmp_path / 'official.pth')
    images = [
        rule.image(record['rule']['salt'] + i['name'], i['height'], i['width'])
        for i in record.get('pictures') or record['images']
    ]
    with np.load(path.with_suffix('.npz')) as arrays, float64(), torch.no_grad():
        for model in (
            hub.entries()[entry](weights=tmp_path / 'official.pth'),
            load_detector(weights=tmp_path / 'official.pth').model,
        ):
            outputs = model.eval()(images)
            assert_close(outputs['pred_boxes'], arrays['pred_boxes'], 'boxes', rtol=1e-6, atol=1e-6)
