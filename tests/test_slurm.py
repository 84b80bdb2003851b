"""Trainings of two processes in a real Slurm: started, preempted, out of time, and continued to the same last bit."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import run_with_submitit
from tests.runs import ROOT, TINY, assert_same, load
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.slow
EPOCH = 60  # steps
FLAGS = f'{TINY} --shapes_train {4 * EPOCH} --batch_size 2 --epochs 2 --eval_every 0 --print_freq 1'.split()
JOB = ['--ngpus', '0', '--nodes', '1', '--tasks_per_node', '2', '--cpus_per_task', '1', '--partition', 'main']
URGENT = ['sbatch', '--parsable', '--partition', 'urgent', '--exclusive', '-o', '/dev/null', '--wrap', 'true']
# Time limits in seconds: of starting to train (mostly imports) on a busy machine, and of a whole run.
START, RUN = 120, 180


@pytest.fixture(scope='module')
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope='module')
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that nobody interrupts, started by tools/run_dist_slurm.sh."""
    folder = tmp_path_factory.mktemp('undisturbed')
    launch = ['env', 'GRES=', 'CPUS_PER_TASK=1', 'tools/run_dist_slurm.sh', 'main', 'undisturbed', '2']
    command = [sys.executable, '-u', 'main.py', *FLAGS, '--output_dir', str(folder)]
    (folder / 'printed').write_text(cluster.run(*launch, *command, timeout=RUN))
    return folder


def test_run_dist_slurm_trains_in_two_tasks(undisturbed: Path) -> None:
    assert len(load(undisturbed)['rng']) == 2
    printed = (undisturbed / 'printed').read_text()
    assert len(re.findall(r'^epoch 2/2: loss', printed, re.MULTILINE)) == 1, 'only one of them reports'


def test_a_preempted_job_ends_like_an_undisturbed_one(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path
) -> None:
    """Another job needs the place: Slurm sends SIGUSR2, and GRACE seconds later it would take it by force. Submitted
    from elsewhere, so that the tasks do not start in the repository.
    """
    submit = ['env', '-C', str(tmp_path), sys.executable, str(ROOT / 'run_with_submitit.py')]
    job_id = cluster.run(*submit, *FLAGS, *JOB, '--job_dir', './%j', timeout=START).removeprefix(
        'Submitted job_id: '
    )
    with explained(tmp_path / job_id):
        wait_for(cluster, tmp_path / job_id, 'epoch 1/2')
        assert cluster.wait_for_state(cluster.run(*URGENT), 'COMPLETED', 60)['Restarts'] == '0'
        assert cluster.wait_for_state(job_id, 'COMPLETED', RUN)['Restarts'] == '1'
        check_interrupted(tmp_path / job_id)
    assert 'this job is preempted' in printed(tmp_path / job_id)
    ours, theirs = load(tmp_path / job_id), load(undisturbed)
    for part in ('model', 'optimizer', 'lr_scheduler', 'rng'):
        assert_same(ours[part], theirs[part], part)
    # Metrics are of both processes, a checkpoint's weights of the first: this shows that they had the same.
    assert (tmp_path / job_id / 'metrics.csv').read_text() == (undisturbed / 'metrics.csv').read_text()
    results = [path.name for path in (tmp_path / job_id).glob('*_result.pkl')]
    assert sorted(results) == [f'{job_id}_{rank}_result.pkl' for rank in (0, 1)]


def test_a_job_out_of_time_goes_on_where_it_stopped(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('SLURM_CONF', 'PATH'):
        monkeypatch.setenv(name, cluster.environment[name])
    flags = [*FLAGS, *JOB, '--timeout', '5', '--job_dir', f'{tmp_path}/%j']
    job_id = run_with_submitit.submit(run_with_submitit.get_submit_parser().parse_args(flags))
    with explained(tmp_path / job_id):
        wait_for(cluster, tmp_path / job_id, 'epoch 1/2')
        cluster.run('scancel', '--signal', 'USR2', job_id)
        wait_for(cluster, tmp_path / job_id, 'goes on after step')
        assert cluster.job(job_id)['Restarts'] == '1'
        check_interrupted(tmp_path / job_id)
    assert 'this job is timed-out' in printed(tmp_path / job_id)
    assert '(29 remaining timeouts)' in printed(tmp_path / job_id)
    assert not list((tmp_path / job_id).glob('*_result.pkl')), (
        'nobody takes an interrupted task for a finished one'
    )
    cluster.run('scancel', job_id)


def test_a_batch_script_goes_on_where_it_stopped(cluster: SlurmCluster, tmp_path: Path) -> None:
    """It asks for no signal of its own, so SIGTERM tells it to make room; main itself must have Slurm requeue it."""
    command = [sys.executable, '-u', 'main.py', *FLAGS, '--output_dir', str(tmp_path)]
    wrap = shlex.join(
        ['env', 'GRES=', 'CPUS_PER_TASK=1', 'tools/run_dist_slurm.sh', 'main', 'batch', '2', *command]
    )
    log = ['--open-mode', 'append', '-o', f'{tmp_path}/batch_log.out']
    job_id = cluster.run('sbatch', '--parsable', '-n2', *log, '--wrap', wrap)
    with explained(tmp_path):
        wait_for(cluster, tmp_path, 'epoch 1/2')
        cluster.wait_for_state(cluster.run(*URGENT), 'COMPLETED', 60)
        wait_for(cluster, tmp_path, 'goes on after step')
        assert cluster.job(job_id)['Restarts'] == '1'
        check_interrupted(tmp_path)
    cluster.run('scancel', job_id)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A failure inside also shows what the job printed."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f'{error}\n{printed(folder)}') from error


def printed(folder: Path) -> str:
    """By both tasks of a job."""
    return '\n'.join(path.read_text() for path in sorted(folder.glob('*_log.*')))


def wait_for(cluster: SlurmCluster, folder: Path, text: str) -> None:
    cluster.wait_until(lambda: text in printed(folder), START, f'"{text}" in {folder}')


def check_interrupted(folder: Path) -> None:
    """Once, in the middle of an epoch, and continued at the same step."""
    text = printed(folder)
    ((step, epoch),) = re.findall(r'asked to stop: saved after step (\d+) of epoch (\d+)', text)
    assert 0 < int(step) < EPOCH
    assert f'epoch {epoch} goes on after step {step} of {EPOCH}' in text


def test_only_tasks_of_srun_have_ranks(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A batch script, which runs once, has SLURM_PROCID and SLURM_NTASKS too."""
    program = tmp_path / 'program.py'
    program.write_text(
        'import os\nfrom util.distributed.launch import export_launcher_environment\nexport_launcher_environment()\n'
        'print(*(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")))\n'
    )
    python = f'PYTHONPATH=. {sys.executable} {program}'
    command = f'echo alone; {python}; echo tasks; srun bash -c "{python}" | sort'
    job_id = cluster.run('sbatch', '--parsable', '-n2', '-o', f'{tmp_path}/out', '--wrap', command)
    cluster.wait_for_state(job_id, 'COMPLETED', 30)
    lines = (tmp_path / 'out').read_text().splitlines()
    assert lines == ['alone', 'None None None None', 'tasks', '0 2 0 127.0.0.1', '1 2 1 127.0.0.1']


@pytest.mark.parametrize('preempted', [True, False], ids=['preempted', 'cancelled'])
def test_preemption_without_a_signal_of_its_own_is_recognised(
    cluster: SlurmCluster, tmp_path: Path, preempted: bool
) -> None:
    """SIGTERM comes with both; only one of the jobs is to be requeued."""
    program, out = tmp_path / 'program.py', tmp_path / 'out'
    program.write_text(
        'import signal, time\nfrom util.distributed.launch import is_preempted\n'
        'def told(*_):\n    print("preempted", is_preempted(), flush=True)\n    raise SystemExit\n'
        'signal.signal(signal.SIGTERM, told)\nprint("ready", flush=True)\ntime.sleep(60)\n'
    )
    command = f'PYTHONPATH=. srun {sys.executable} {program}'
    job_id = cluster.run('sbatch', '--parsable', '-o', str(out), '--wrap', command)
    cluster.wait_until(lambda: out.exists() and 'ready' in out.read_text(), 30, 'listening job')
    if preempted:
        cluster.run(*URGENT)
    else:
        cluster.run('scancel', job_id)
    cluster.wait_until(lambda: f'preempted {preempted}' in out.read_text(), 20, f'answer: {out.read_text()}')
