"""How the files of this repository lean on each other, and how long they are."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.runs import ROOT

MOST_LINES = 480
FOLDERS = ('models', 'datasets', 'util', 'tools')


def name_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def product() -> dict[str, Path]:
    """Files of the product by the names of their modules."""
    paths = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in (ROOT / folder).rglob('*.py'))]
    return {name_of(path): path for path in paths}


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and names of each import in a file; `import a.b` has no names."""
    package = name_of(path).split('.')[: None if path.stem == '__init__' else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*above, node.module] if node.module else above)
            yield module, [alias.name for alias in node.names]


def leans_on(path: Path, modules: dict[str, Path]) -> set[str]:
    """Those of the modules that a file imports. A package is among them for names that it defines, not for
    the modules in it.
    """
    found = set()
    for module, names in imports(path):
        found.update(f'{module}.{name}' if f'{module}.{name}' in modules else module for name in names)
        found.update([] if names else [module])
    return found & modules.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Nodes that reach themselves, those that reach each other together."""
    reached = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            ahead += (fresh := graph[ahead.pop()] - seen)
            seen |= fresh
        reached[start] = seen
    found = [
        sorted(n for n in reached[start] if start in reached[n]) for start in graph if start in reached[start]
    ]
    return sorted(map(list, set(map(tuple, found))))


def test_circles_are_found() -> None:
    graph = {'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'d'}, 'e': {'a'}}
    assert circles(graph) == [['b', 'c'], ['d']]


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Imports inside functions and for type checkers count, too."""
    modules = product()
    graph = {name: leans_on(path, modules) for name, path in modules.items()}
    assert graph['main'] >= {'engine', 'models'}, 'imports are found'
    assert circles(graph) == []


def test_no_file_is_too_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in product().items()}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_no_test_module_is_a_library() -> None:
    """What tests share lies in modules that are named after it."""
    for path in (ROOT / 'tests').glob('*.py'):
        found = [
            name
            for module, names in imports(path)
            for name in [module, *(f'{module}.{name}' for name in names)]
        ]
        assert not [name for name in found if name.startswith('tests.test_')], path.name


def module_level_imports(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield '.' * node.level + (node.module or '')
            yield from ('.' * node.level + f'{node.module or ""}.{alias.name}' for alias in node.names)


def test_inference_never_imports_training() -> None:
    loaded, dependencies = loaded_by_the_hub()
    assert not [name for name in loaded if 'models.training' in name]
    ours = {name.split('.', 1)[1] for name in loaded if re.match(r'detr_\w+\.', name)}
    assert 40 < len(ours) < 65, 'what inference does not need stays out'
    assert not ours & {
        'datasets.build',
        'datasets.loaders',
        'datasets.coco',
        'util.run',
        'util.optim',
        'util.nan_guard',
    }
    modules = product()
    needed = {found.split('.')[0] for name in ours for found in module_level_imports(modules[name])}
    assert needed - set(sys.stdlib_module_names) - {'', *FOLDERS} == set(dependencies)


def loaded_by_the_hub() -> tuple[list[str], list[str]]:
    """Names of all modules that `import hubconf` loads in a process of its own, and the packages that it asks
    for.
    """
    code = 'import json, sys, hubconf; print(json.dumps([list(sys.modules), hubconf.dependencies]))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_packages_import_each_other_in_the_form_that_the_hub_knows() -> None:
    """`from models import ...`, which hubconf.py gives another name; never `import models`."""
    for folder in ('models', 'datasets', 'util'):
        for path in (ROOT / folder).rglob('*.py'):
            for module, names in imports(path):
                assert names or module.split('.')[0] not in FOLDERS, f'{path}: import {module}'


def test_util_knows_neither_models_nor_datasets() -> None:
    for path in (ROOT / 'util').rglob('*.py'):
        assert not [
            name for name in module_level_imports(path) if name.startswith(('models', 'datasets', 'engine'))
        ], path
