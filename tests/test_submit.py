"""run_with_submitit.py without a cluster: what it asks for, and what it refuses. tests/test_slurm.py runs it."""

import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

import run_with_submitit
from run_with_submitit import find_job_dir, get_submit_parser, job_parameters, submit
from tests.runs import TINY
from util.errors import UserError


def test_the_job_asks_for_what_the_official_script_asks_for() -> None:
    assert job_parameters(get_submit_parser().parse_args([])) == {
        'name': 'detr',
        'nodes': 4,
        'tasks_per_node': 8,
        'gpus_per_node': 8,
        'cpus_per_task': 10,
        'mem_gb': 320,
        'timeout_min': 60,
        'slurm_signal_delay_s': 120,
        'slurm_srun_args': ['--kill-on-bad-exit=1'],
        'slurm_additional_parameters': {'requeue': True},
    }


def test_a_job_without_gpus_asks_for_none() -> None:
    flags = '--ngpus 0 --tasks_per_node 2 --mem_gb 4 --partition main --qos low --account lab --constraint avx --comment hi'
    found = job_parameters(get_submit_parser().parse_args(flags.split()))
    assert 'gpus_per_node' not in found and (found['tasks_per_node'], found['mem_gb']) == (2, 4)
    named = {f'slurm_{name}' for name in ('partition', 'qos', 'account', 'constraint', 'comment')}
    assert named <= set(found)


def test_the_folder_of_a_job_is_its_output_folder(tmp_path: Path) -> None:
    for flag in ('--job_dir', '--output_dir'):
        assert find_job_dir(get_submit_parser().parse_args([flag, f'{tmp_path}/%j'])) == f'{tmp_path}/%j'


def pickled() -> bytes:
    """A job as submitit writes it, which pickles what is defined in the program itself by its content."""
    args = get_submit_parser().parse_args(TINY.split())
    cloudpickle.register_pickle_by_value(run_with_submitit)
    try:
        return cloudpickle.dumps(run_with_submitit.Training(args, args.given))
    finally:
        cloudpickle.unregister_pickle_by_value(run_with_submitit)


def test_a_continued_job_has_the_flags_of_the_first() -> None:
    """But goes on with its checkpoint, if there is one."""
    training = pickle.loads(pickled())
    assert 'hidden_dim' in training.given and 'nheads' in training.given and 'dropout' not in training.given
    before = dict(vars(training.args))
    after = vars(training.checkpoint().function.args)
    assert after == before | {'resume': 'auto'}


def test_a_task_reads_its_job_in_another_folder(tmp_path: Path) -> None:
    """Where no module of ours is known yet."""
    (tmp_path / 'job').write_bytes(pickled())
    code = 'import pickle, sys; print(pickle.load(open("job", "rb")).args.hidden_dim, "util" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ['32', 'False'], done.stderr


TEXTS = ('job_dir', 'output_dir', 'job_name', 'partition', 'constraint', 'comment', 'qos', 'account')


@pytest.mark.parametrize('flag', TEXTS)
@pytest.mark.parametrize('text', ['a\ntouch ran', 'a\rb', 'a\x0bb', 'a\u2028b'])
def test_no_flag_adds_a_line_to_the_script(flag: str, text: str, tmp_path: Path) -> None:
    words = ['--job_dir', str(tmp_path)] if flag not in ('job_dir', 'output_dir') else []
    with pytest.raises(UserError, match=r'--\w+ .*has a line break') as refused:
        submit(get_submit_parser().parse_args([*words, f'--{flag}', text]))
    assert f'--{flag if words else "job_dir"} ' in str(refused.value)


def test_every_text_of_a_job_is_known_here() -> None:
    """So that a new flag is in the test above."""
    parser = get_submit_parser()
    group = next(group for group in parser._action_groups if group.title == 'Slurm')
    assert {action.dest for action in group._group_actions if action.type is str} == set(TEXTS) - {
        'output_dir'
    }


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('', 'give --job_dir'),
        ('--job_dir a --output_dir b', 'leave --output_dir out'),
        ('--job_dir a --nodes 0', '--nodes must be at least 1, not 0'),
        ('--job_dir a --ngpus -1', '--ngpus must be at least 0, not -1'),
        ('--job_dir a --tasks_per_node 0', '--tasks_per_node must be at least 1, not 0'),
        ('--job_dir a --ngpus 8 --tasks_per_node 1', 'each GPU needs one process'),
        ('--job_dir a --timeout 2', '--signal_delay 120 seconds are not less than --timeout 2 minutes'),
        ('--job_dir a --dry_run', 'needs no job: give it to main.py'),
        ('--job_dir a --deformable --masks --co_masks', 'two ways to predict masks'),
        ('--job_dir a', 'there is no Slurm here'),
    ],
)
def test_impossible_jobs_get_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ValueError, match=message):
        submit(get_submit_parser().parse_args(flags.split()))
