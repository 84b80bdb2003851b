"""scripts/gpu_check.sh works where there is no GPU, so that it has no fault of its own when there is one."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from datasets.shapes import ShapesDetection, export_shapes
from tools.benchmarks.official import modernise

ROOT = Path(__file__).resolve().parents[1]
TRAININGS = (
    'train_off',
    'train_bf16',
    'train_comparison',
    'quickstart',
    'steps',
    'fps',
    'schemes',
    'convergence',
)
STAGES = ('kernels', 'operator', 'steps', 'tests', 'train', 'convergence')


def gpu_check(
    folder: Path, *arguments: str, device: str = '--cpu', programs: Path = Path(sys.executable).parent
) -> tuple[int, dict[str, str], str]:
    """Exit status, result of each step, and what was printed. programs: folder that is searched first."""
    environment = os.environ | {
        'VENV': 'none',
        'OUT': str(folder),
        'PATH': f'{programs}:{os.environ["PATH"]}',
    }
    command = ['bash', str(ROOT / 'scripts/gpu_check.sh'), *device.split(), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd='/', timeout=1200)
    table = (folder / 'summary.md').read_text().split('| --- |')[-1]
    cells = [row.strip('| ').split(' | ') for row in table.splitlines() if row.startswith('| ')]
    return done.returncode, {name: result for name, result, *_ in cells}, done.stdout


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(tmp_path: Path, exhaustive: bool) -> None:
    """The others are benchmarks and checks of kernels, which have tests of their own, and more trainings."""
    stages = STAGES if exhaustive else ('operator', 'tests')
    for split, count in (('train', 8), ('val', 4)):
        export_shapes(tmp_path / 'data', ShapesDetection(count, split))
    status, results, printed = gpu_check(
        tmp_path / 'out', '--data', str(tmp_path / 'data'), '--limit', '900', *stages
    )
    assert status == 0, printed
    ran = {name for name, result in results.items() if result == 'ok'}
    assert ran == {'operator', *(('operator_test', *TRAININGS) if exhaustive else ())}
    left_out = {
        'ncu',
        'all_kernels',
        'gpu_tests',
        'memcheck',
        'racecheck',
        'synccheck',
        'initcheck',
        *['build', 'compiler_report', 'step_profile', 'steps_compiled'] * exhaustive,
    }
    assert {name for name, result in results.items() if result == 'left out'} == left_out
    for name in (
        ('train_comparison.png', 'quickstart_predictions.png', 'convergence.png') if exhaustive else ()
    ):
        assert (tmp_path / 'out' / name).is_file()
    with tarfile.open(tmp_path / 'out/files.tar.gz') as files:
        assert './logs/operator.txt' in files.getnames()


def test_what_does_not_fit_into_the_time_is_said(tmp_path: Path) -> None:
    status, results, _ = gpu_check(tmp_path, '--limit', '4', 'kernels', 'operator')
    assert status == 1
    assert {results['operator'], results['operator_test']} == {'NOT RUN'}


@pytest.mark.parametrize('kernels', ['cuda', 'triton'])
def test_what_is_measured_on_a_gpu_runs_on_the_cuda_kernels(kernels: str, tmp_path: Path) -> None:
    """With programs that only say what they would run on."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    for name in ('python', 'ncu', 'nvidia-smi', 'compute-sanitizer'):
        (programs / name).write_text(f'#!/bin/sh\necho {kernels} kernels of deformable attention on cuda\n')
        (programs / name).chmod(0o755)
    stages = 'kernels', 'operator', 'steps', 'tests'
    status, results, _ = gpu_check(tmp_path / 'out', *stages, device='', programs=programs)
    failed = {name for name, result in results.items() if result == 'FAILED (not on the CUDA kernels)'}
    measured = {'operator', 'step_profile', 'steps', 'fps', 'steps_compiled'}
    assert failed == (set() if kernels == 'cuda' else measured) and status == bool(failed)
    assert set(results.values()) == {'ok', *(['FAILED (not on the CUDA kernels)'] if failed else [])}
    assert results.keys() > {'ncu', 'all_kernels', 'memcheck', 'racecheck', 'synccheck', 'initcheck'}


def test_the_official_sources_are_brought_up_to_date() -> None:
    """Of each change one line as the official files have it."""
    old = """#include <THC/THCAtomics.cuh>
AT_ASSERTM(value.type().is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.type(), "forward", ([&] { f(value.data<scalar_t>(), shapes.data<int64_t>()); }));
AT_ERROR("Not compiled with GPU support");"""
    assert (
        modernise(old)
        == """
TORCH_CHECK(value.is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "forward", ([&] { f(value.data_ptr<scalar_t>(), shapes.data_ptr<int64_t>()); }));
TORCH_CHECK(false, "Not compiled with GPU support");"""
    )
