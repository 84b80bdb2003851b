"""Runs that are stopped, killed, restarted, or started twice: nothing is lost, and everybody is told why."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine
import main
from tests.processes import end_group, group_environment, run_main, start, start_group, start_main
from tests.runs import ROOT, TINY, assert_same, fill_disk, load
from util.distributed.preemption import UNFINISHED
from util.errors import FileError, UserError
from util.files import lock_folder
from util.run import Run

# Twelve steps an epoch for one process, six for two.
LONG = [
    *TINY.split(),
    '--shapes_train',
    '24',
    '--batch_size',
    '2',
    '--epochs',
    '2',
    '--ema',
    '0.99',
    '--print_freq',
    '1',
]


# No padding, which depends on who shares a batch; and no steps by the sign of rounding errors.
SQUARES = ['--aug', 'lsj', '--img_size', '64', '--sgd', '--lr', '1e-2']


def wait_for(log: Path, text: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while text not in (log.read_text() if log.exists() else ''):
        assert time.monotonic() < deadline, (
            f'{text} never came: {log.read_text() if log.exists() else "nothing"}'
        )
        time.sleep(0.02)


def same_end(one: Path, other: Path) -> None:
    """Checkpoints with all states, and the logged numbers."""
    assert_same(load(one), load(other))
    assert (one / 'metrics.csv').read_text() == (other / 'metrics.csv').read_text()


def whole_run(folder: Path, number: int, *flags: str) -> Path:
    """An undisturbed run with so many processes."""
    assert (
        end_group(
            start_group(folder / 'whole_log', [*LONG, *flags, '--output_dir', str(folder / 'whole')], number)
        )
        == [0] * number
    )
    return folder / 'whole'


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_in_the_middle_of_an_epoch(tmp_path: Path, number: int) -> None:
    command = [*LONG, '--output_dir', str(tmp_path / 'parts'), '--total_batch_size', '4', '--resume', 'auto']
    log = tmp_path / 'log'
    process = start_main(log, command, {})
    wait_for(log, 'epoch 1/2  2/6')
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == UNFINISHED
    within = load(tmp_path / 'parts')['within_epoch']
    assert 2 * 4 <= within['images'] < 24
    assert 'asked to stop: saved after step' in log.read_text()
    process = start_main(log, command, {})
    process.join(120)
    assert process.exitcode == 0 and 'epoch 1 goes on after step' in log.read_text()
    same_end(whole_run(tmp_path, 1, '--total_batch_size', '4'), tmp_path / 'parts')


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path: Path) -> None:
    """While it trains; then once more while it evaluates."""
    flags = [
        '--num_workers',
        '1',
        '--batches',
        'size',
        '--eval_every',
        '2',
        '--shapes_val',
        '60',
        '--worst_batch_first',
    ]
    command = [*LONG, *flags, '--output_dir', str(tmp_path / 'parts'), '--resume', 'auto']
    log = tmp_path / 'log'
    for text in ('epoch 1/2  3/6', 'epoch 2/2 evaluate'):
        processes = start_group(log, command)
        wait_for(tmp_path / 'log0', text)
        os.kill(processes[1].pid, signal.SIGTERM)
        assert end_group(processes) == [UNFINISHED] * 2
    assert end_group(start_group(log, command)) == [0, 0]
    same_end(whole_run(tmp_path, 2, *flags), tmp_path / 'parts')


def test_a_step_that_is_not_finite_is_left_out_and_half_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, steps = engine.weighted_sum, [0]

    def third_is_nan(*args: object) -> torch.Tensor:
        steps[0] += 1
        return original(*args) * (float('nan') if steps[0] == 3 else 1)

    monkeypatch.setattr(engine, 'weighted_sum', third_is_nan)
    flags = [*LONG, '--output_dir', str(tmp_path), '--checkpoint_steps', '1', '--print_freq', '100']
    (tmp_path / '.checkpoint.12345.pth').write_bytes(b'half a file of a process that was killed')
    main.main(main.get_args_parser().parse_args(flags))
    assert 'epoch 1/2 step 3 is left out, it is not finite: not found' in capsys.readouterr().out
    assert all(value.isfinite().all() for value in load(tmp_path)['model'].values())
    assert not list(tmp_path.glob('.*'))


@pytest.mark.slow
def test_saving_every_few_steps_is_enough_for_a_run_that_is_killed(tmp_path: Path) -> None:
    command = [*LONG, '--output_dir', str(tmp_path / 'parts'), '--checkpoint_steps', '3', '--resume', 'auto']
    process = start_main(tmp_path / 'log', command, {})
    wait_for(tmp_path / 'log', 'epoch 1/2   8/12')
    process.kill()
    process.join()
    assert load(tmp_path / 'parts')['within_epoch']['images'] in (12, 18)
    process = start_main(tmp_path / 'log', command, {})
    process.join(120)
    assert process.exitcode == 0
    whole = whole_run(tmp_path, 1)
    ours, theirs = load(tmp_path / 'parts'), load(whole)
    del ours['args']['checkpoint_steps'], theirs['args']['checkpoint_steps']
    assert_same(ours, theirs)
    assert (whole / 'metrics.csv').read_text() == (tmp_path / 'parts/metrics.csv').read_text()


def end_as_a_launcher(processes: list) -> list[int]:
    """Exit codes; once one process has failed, the others are killed a little later, as torchrun and srun do:
    one that still waits for the others to come would wait for minutes.
    """
    while all(process.is_alive() for process in processes):
        time.sleep(0.05)
    for process in processes:
        process.join(10)
        if process.is_alive() and any(other.exitcode for other in processes):
            process.kill()
    return end_group(processes)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path, exhaustive: bool) -> None:
    """Two processes; one of them is killed, or both, or one is asked to stop, again and again until the run
    has ended.
    """
    kills = 40 if exhaustive else 4
    flags = ['--checkpoint_steps', '1', '--epochs', str(6 * kills // 5), '--eval_every', str(kills // 3)]
    command = [*LONG, *flags, '--output_dir', str(tmp_path / 'parts'), '--resume', 'auto']
    chance, disturbed, codes = random.Random(0), 0, [1, 1]
    while codes != [0, 0]:
        processes = start_group(tmp_path / f'log{disturbed}_', command)
        if disturbed < kills:
            if disturbed % 2:  # while it trains; else perhaps while it starts
                wait_for(tmp_path / f'log{disturbed}_0', 'img/s')
            time.sleep(chance.uniform(0.0, 1.0))
            chosen = chance.choice([processes, processes[:1], processes[1:]])
            for process in chosen:
                os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            disturbed += 1
        codes = end_as_a_launcher(processes)
        assert disturbed <= kills and set(codes) <= {0, 1, UNFINISHED, -signal.SIGKILL, -signal.SIGTERM}
    assert disturbed == kills
    logs = [path.read_text() for path in tmp_path.glob('log*_0')]
    assert sum('goes on after step' in text for text in logs) >= kills // 3
    ours, theirs = load(tmp_path / 'parts'), load(whole_run(tmp_path, 2, *flags))
    assert_same(ours, theirs)
    assert (tmp_path / 'whole/metrics.csv').read_text() == (tmp_path / 'parts/metrics.csv').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_killed_process_ends_the_other(tmp_path: Path, rank: int) -> None:
    """Without a launcher, which would end it too."""
    processes = start_group(tmp_path / 'log', [*LONG, '--epochs', '500', '--eval_every', '500'])
    wait_for(tmp_path / 'log0', 'epoch 1/500  5/6')
    processes[rank].kill()
    other = processes[1 - rank]
    other.join(60)
    assert other.exitcode == 1


def fail_in_training(log: str, argv: list[str]) -> None:
    def fail(*args: object, **more: object) -> None:
        raise UserError('image.jpg is not a readable image')

    if os.environ['RANK'] == '1':
        engine.train_one_epoch = fail
    run_main(log, argv)


@pytest.mark.slow
def test_the_process_that_fails_is_the_first_to_say_why(tmp_path: Path) -> None:
    processes = [
        start(environment, fail_in_training, str(tmp_path / 'log'), LONG)
        for environment in group_environment(2)
    ]
    assert end_group(processes) == [1, 1]
    text = (tmp_path / 'log').read_text()
    assert text.index('error: image.jpg is not a readable image') < text.index('Traceback'), text


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with (
            pytest.raises(
                ValueError, match=f'is in use by process {os.getpid()} on .*choose another --output_dir'
            ),
            lock_folder(tmp_path, wait=0.1),
        ):
            pass
        child = multiprocessing.get_context('fork').Process(
            target=time.sleep, args=(30,)
        )  # as a loader worker
        child.start()
    with lock_folder(tmp_path, wait=0.1):
        child.kill()
    child.join()


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('util.run.lock_folder', lambda folder: lock_folder(folder, wait=0.1))
    with lock_folder(tmp_path), pytest.raises(ValueError, match='is in use by process'):
        main.main(main.get_args_parser().parse_args([*LONG, '--output_dir', str(tmp_path)]))
    assert {path.name for path in tmp_path.iterdir()} == {'run.lock'}


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path: Path) -> None:
    """The same command, without --resume."""
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '--max_restarts',
        '1',
    ]
    program, log, flags = tmp_path / 'main.py', tmp_path / 'log', ['--checkpoint_steps', '1', '--epochs', '1']
    program.write_text(
        f'import sys\nsys.path[0] = {str(ROOT)!r}\nfrom tests.processes import run_main\n'
        f'run_main({str(log)!r}, sys.argv[1:])\n'
    )
    command += [str(program), *LONG, *flags, '--output_dir', str(tmp_path / 'parts')]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    with (tmp_path / 'launcher').open('w') as file:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        wait_for(log, 'epoch 1/1  3/6')
        children = subprocess.run(
            ['pgrep', '-P', str(launcher.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert launcher.wait(180) == 0, log.read_text()
    assert 'goes on after step' in log.read_text()
    same_end(whole_run(tmp_path, 2, *flags), tmp_path / 'parts')


@pytest.mark.slow
def test_another_number_of_processes_sees_the_rest_of_the_images(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch with two processes, resumed with one of twice the batch."""
    flags = [
        *LONG,
        '--output_dir',
        str(tmp_path / 'parts'),
        '--resume',
        'auto',
        '--backbone_norm',
        'group',
        '--dropout',
        '0',
        *SQUARES,
    ]
    processes = start_group(tmp_path / 'log', flags)
    wait_for(tmp_path / 'log0', 'epoch 1/2  3/6')
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert end_group(processes) == [UNFINISHED] * 2
    single = [*LONG, '--batch_size', '4', '--backbone_norm', 'group', '--dropout', '0', *SQUARES]
    for name in ('parts', 'whole'):
        run = start_main(
            tmp_path / f'{name}.log', [*single, '--output_dir', str(tmp_path / name), '--resume', 'auto'], {}
        )
        run.join(120)
        assert run.exitcode == 0
    ours, theirs = load(tmp_path / 'parts'), load(tmp_path / 'whole')
    for name, value in theirs['model'].items():
        torch.testing.assert_close(ours['model'][name], value, rtol=1e-3, atol=1e-4)
    assert ours['metrics']['train_loss'] == pytest.approx(theirs['metrics']['train_loss'], rel=1e-3)


@pytest.mark.slow
def test_a_pause_changes_nothing(tmp_path: Path) -> None:
    """SIGSTOP to both processes in the middle of an epoch, SIGCONT later."""
    processes = start_group(tmp_path / 'log', [*LONG, '--output_dir', str(tmp_path / 'parts')])
    wait_for(tmp_path / 'log0', 'epoch 1/2  3/6')
    for number, seconds in ((signal.SIGSTOP, 3), (signal.SIGCONT, 0)):
        for process in processes:
            os.kill(process.pid, number)
        time.sleep(seconds)
    assert end_group(processes) == [0, 0]
    same_end(whole_run(tmp_path, 2), tmp_path / 'parts')


@pytest.mark.draws
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, says so each time, and ends with an error; with space again it goes on to the same
    end.
    """
    out, flags = small_disk / 'out', [*LONG, '--shapes_train', '8', '--epochs', '3', '--resume', 'auto']
    arguments = main.get_args_parser().parse_args([*flags, '--epochs', '1', '--output_dir', str(out)])
    main.main(arguments)
    before = load(out)
    fill_disk(small_disk)
    capsys.readouterr()
    arguments = main.get_args_parser().parse_args([*flags, '--output_dir', str(out)])
    with pytest.raises(FileError, match='free some space'):
        main.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count('checkpoint.pth could not be written') == 2 and 'epoch 3/3: loss' in printed
    assert_same(load(out), before)
    (small_disk / 'filler').unlink()
    main.main(main.get_args_parser().parse_args([*flags, '--output_dir', str(out)]))
    main.main(main.get_args_parser().parse_args([*flags, '--output_dir', str(tmp_path / 'whole')]))
    same_end(tmp_path / 'whole', out)


@pytest.mark.draws
def test_a_folder_that_is_removed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, out = Run.keep_numbered, tmp_path / 'out'

    def removed(run: Run) -> None:
        original(run)
        if run.epoch == 1:
            shutil.rmtree(out)

    monkeypatch.setattr(Run, 'keep_numbered', removed)
    main.main(main.get_args_parser().parse_args([*LONG, '--output_dir', str(out)]))
    assert load(out)['epoch'] == 1 and len((out / 'metrics.csv').read_text().splitlines()) == 3


def test_other_images_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / 'out')
    main.main(main.get_args_parser().parse_args([*LONG, '--epochs', '1', '--output_dir', out]))
    fewer = [*LONG, '--shapes_train', '12', '--resume', 'auto', '--output_dir', out]
    main.main(main.get_args_parser().parse_args(fewer))
    assert 'was trained on 24 images of 6 class indices' in capsys.readouterr().out
    checkpoint = load(tmp_path / 'out')
    checkpoint['within_epoch'] = {'images': 4, 'meters': [], 'tallies': []}
    torch.save(checkpoint, tmp_path / 'out/checkpoint.pth')
    with pytest.raises(ValueError, match='cannot go on with other images'):
        main.main(
            main.get_args_parser().parse_args(
                [*LONG, '--epochs', '4', '--resume', 'auto', '--output_dir', out]
            )
        )
