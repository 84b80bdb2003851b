"""
Train in a Slurm cluster: main.py with all its flags as a job of submitit, which is continued after time-outs and
preemptions where it stopped.

  python run_with_submitit.py --nodes 1 --timeout 3000 --coco_path DATA --job_dir SHARED/%j
  python run_with_submitit.py --nodes 1 --ngpus 0 --tasks_per_node 2 ...      without GPUs
"""

import argparse
import getpass
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from util.config.parser import make_parser
from util.config.recipes import with_named_flags
from util.config.settle import EVERYTHING, settle
from util.errors import UserError
from util.flags import run_command

MAX_TIMEOUTS = 30  # times that a job is continued after its time was over; preemptions do not count
SHARED = Path('/checkpoint')  # where the official script keeps everything


def get_submit_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags of main.py and of the job."""
    parser = make_parser(__doc__)
    parser.usage = 'python run_with_submitit.py [flags]'
    job = parser.add_argument_group('Slurm')
    job.add_argument('--ngpus', default=8, type=int, help='GPUs per node; 0: none (default: %(default)s)')
    job.add_argument('--nodes', default=4, type=int, help='number of nodes (default: %(default)s)')
    job.add_argument('--tasks_per_node', type=int, help='processes per node (default: --ngpus, at least 1)')
    job.add_argument('--timeout', default=60, type=int,
                     help=f'minutes after which the job is interrupted; it goes on, up to {MAX_TIMEOUTS} times '
                          '(default: %(default)s)')  # fmt: skip
    job.add_argument('--signal_delay', default=120, type=int,
                     help='seconds before the end of the time at which the state is saved; more than a step and an '
                          'evaluation take (default: %(default)s)')  # fmt: skip
    job.add_argument('--job_dir', default='', metavar='DIR',
                     help='folder that all nodes share, for logs and as --output_dir; %%j is the number of the job '
                          f'(default: --output_dir, or {SHARED}/USER/experiments/%%j)')  # fmt: skip
    job.add_argument('--job_name', default='detr', help='name of the job (default: %(default)s)')
    job.add_argument(
        '--cpus_per_task', default=10, type=int, help='CPU cores per process (default: %(default)s)'
    )
    job.add_argument('--mem_gb', type=float,
                     help='memory per node, GB (default: 40 per GPU; without GPUs what the cluster gives)')  # fmt: skip
    for flag, what in (
        ('partition', 'partitions, separated by commas'),
        ('constraint', 'features that the nodes must have'),
        ('comment', 'remark that Slurm keeps with the job'),
        ('qos', 'quality of service'),
        ('account', 'account that is charged'),
    ):
        job.add_argument(f'--{flag}', help=f"{what} (default: the cluster's)")
    return parser


class Training:
    """Program of every task of the job. It is pickled; the tasks may start in another folder."""

    def __init__(self, args: Namespace) -> None:
        self.args = Namespace(**vars(args))  # a plain one: when it is read, no module of ours is known yet
        self.given = getattr(args, 'given', frozenset(vars(args)))
        self.root = str(Path(__file__).resolve().parent)

    def __call__(self) -> None:
        import submitit

        sys.path.insert(0, self.root)
        import main
        from util.flags import ParsedFlags

        args = ParsedFlags(**vars(self.args))  # a copy: `checkpoint` wants the flags of the user
        args.given = self.given
        args.output_dir = args.output_dir.replace('%j', submitit.JobEnvironment().job_id)
        main.main(args)

    def checkpoint(self) -> object:
        """Requeue the job: submitit calls this in the first task when time is over or another job preempts it. main has saved the state
        by then, or has nothing to save yet. Returns what the job runs when Slurm starts it again.
        """
        import submitit

        self.args.resume = 'auto'
        return submitit.helpers.DelayedSubmission(self)


def find_job_dir(args: Namespace) -> str:
    """Raise ValueError if no folder is named, or two."""
    if args.job_dir and args.output_dir and args.job_dir != args.output_dir:
        raise UserError('--job_dir is the output folder too: leave --output_dir out')
    if args.job_dir or args.output_dir:
        return str(Path(args.job_dir or args.output_dir).resolve())
    if SHARED.is_dir():
        return str(SHARED / getpass.getuser() / 'experiments/%j')
    raise UserError('give --job_dir, a folder that all nodes share, for instance $HOME/experiments/%j')


def job_parameters(args: Namespace) -> dict[str, object]:
    """Return what submitit asks Slurm for; raise UserError for impossible numbers."""
    tasks = args.tasks_per_node if args.tasks_per_node is not None else max(args.ngpus, 1)
    if args.ngpus < 0:
        raise UserError(f'--ngpus must be at least 0, not {args.ngpus}')
    counts = {
        'nodes': args.nodes,
        'tasks_per_node': tasks,
        'timeout': args.timeout,
        'cpus_per_task': args.cpus_per_task,
    }
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f'--{flag} must be at least 1, not {value}')
    if args.ngpus and tasks != args.ngpus:
        raise UserError(
            f'--tasks_per_node {tasks} differs from --ngpus {args.ngpus}: each GPU needs one process'
        )
    if args.signal_delay >= 60 * args.timeout:
        raise UserError(
            f'--signal_delay {args.signal_delay} seconds are not less than --timeout {args.timeout} minutes'
        )
    wanted = {
        'name': args.job_name,
        'nodes': args.nodes,
        'tasks_per_node': tasks,
        'gpus_per_node': args.ngpus or None,
        'cpus_per_task': args.cpus_per_task,
        'mem_gb': args.mem_gb or 40 * args.ngpus or None,
        'timeout_min': args.timeout,
        'slurm_signal_delay_s': args.signal_delay,
        # Some clusters start no job again that does not ask for it.
        'slurm_additional_parameters': {'requeue': True},
    }
    wanted |= {
        f'slurm_{flag}': getattr(args, flag)
        for flag in ('partition', 'constraint', 'comment', 'qos', 'account')
    }
    return {name: value for name, value in wanted.items() if value is not None}


def check_script(folder: str, parameters: dict[str, object]) -> None:
    """Refuse values that would begin a line of their own in the script for sbatch, which a shell runs.

    Raises:
        UserError: one has a line break, or another character that is not printed.
    """
    for name, value in {'job_dir': folder, **parameters}.items():
        if isinstance(value, str) and not value.isprintable():
            flag = 'job_name' if name == 'name' else name.removeprefix('slurm_')
            raise UserError(f'--{flag} {value!r} has a line break or another control character: leave it out')


def submit(args: Namespace) -> str:
    """Submit the job and return its number; raise UserError for impossible flags, or without Slurm."""
    args.output_dir = find_job_dir(args)
    if args.dry_run:
        raise UserError('--dry_run needs no job: give it to main.py')
    settle(with_named_flags(args), EVERYTHING)
    parameters = job_parameters(args)
    check_script(args.output_dir, parameters)
    if not shutil.which('sbatch'):
        raise UserError('there is no Slurm here (no sbatch); on one machine use torchrun')
    import submitit

    executor = submitit.AutoExecutor(args.output_dir, cluster='slurm', slurm_max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**parameters)
    return executor.submit(Training(args)).job_id


if __name__ == '__main__':
    run_command(lambda args: f'Submitted job_id: {submit(args)}', get_submit_parser())
