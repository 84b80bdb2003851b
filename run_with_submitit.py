"""
Train in a Slurm cluster: main.py with all its flags as a job of submitit. After time-outs and preemptions the
job resumes where it stopped.

  python run_with_submitit.py --nodes 1 --timeout 3000 --coco_path DATA --job_dir SHARED/%j
  python run_with_submitit.py --nodes 1 --ngpus 0 --tasks_per_node 2 ...      without GPUs
"""

import argparse
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from util.command_line import check_bounds, float_range, given_of, int_range, run_command
from util.config.parser import build_parser
from util.config.recipes import with_named_flags
from util.config.settle import EVERYTHING, settle
from util.errors import UserError

MAX_TIMEOUTS = 30  # number of times that a job resumes after its time limit; preemptions do not count
CLUSTER_FLAGS = {  # of sbatch; the cluster has defaults for them
    'partition': 'partitions, separated by commas',
    'constraint': 'features that the nodes must have',
    'comment': 'remark that Slurm keeps with the job',
    'qos': 'quality of service',
    'account': 'account that is charged',
}
JOB_FLAGS = (  # name, type, default, help
    ('ngpus', int_range(0), 8, 'GPUs per node; 0: none'),
    ('nodes', int_range(1), 4, 'number of nodes'),
    ('tasks_per_node', int_range(1), None, 'processes per node (default: --ngpus, at least 1)'),
    ('timeout', int_range(1), 60, f'minutes of a part of the job, which has up to {MAX_TIMEOUTS + 1} parts'),
    ('signal_delay', int_range(0), 120, 'seconds for the last step and for saving before --timeout'),
    ('job_dir', str, '', 'shared folder of logs and output; %%j: number of the job (default: --output_dir)'),
    ('job_name', str, 'detr', 'name of the job'),
    ('cpus_per_task', int_range(1), 10, 'CPU cores per process'),
    ('mem_gb', float_range(), None, "memory per node, GB (default: 40 per GPU; without GPUs the cluster's)"),
    *((name, str, None, f"{text} (default: the cluster's)") for name, text in CLUSTER_FLAGS.items()),
)


def get_submit_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags of main.py and of the job."""
    parser = build_parser(__doc__)
    parser.usage = 'python run_with_submitit.py [flags]'
    job = parser.add_argument_group('Slurm')
    for name, kind, default, text in JOB_FLAGS:
        shown = f'{text} (default: {default})' if default else text
        job.add_argument(f'--{name}', type=kind, default=default, help=shown)
    return parser


class Training:
    """Program of every task of the job. It is pickled; the tasks may start in another folder."""

    def __init__(self, args: Namespace, given: frozenset[str]) -> None:
        self.args = Namespace(**vars(args))  # plain, since it is unpickled before our modules can be imported
        self.given = given
        self.root = str(Path(__file__).resolve().parent)

    def __call__(self) -> None:
        import submitit

        sys.path.insert(0, self.root)
        import main
        from util.command_line import ParsedFlags

        args = ParsedFlags(**vars(self.args))  # a copy, since `checkpoint` needs the flags of the user
        args.given = self.given
        args.output_dir = args.output_dir.replace('%j', submitit.JobEnvironment().job_id)
        main.main(args)

    def checkpoint(self) -> object:
        """Return the program of the job when Slurm starts it again: the same run, from its checkpoint.

        submitit calls this in the first task at the time limit or when another job preempts this one. `main`
        has saved the state by then, or has nothing to save yet.
        """
        import submitit

        self.args.resume = 'auto'
        return submitit.helpers.DelayedSubmission(self)


def find_job_dir(args: Namespace) -> str:
    """Return the folder of the job; raise UserError unless the flags name one folder."""
    if args.job_dir and args.output_dir and args.job_dir != args.output_dir:
        raise UserError('--job_dir is the output folder too: leave --output_dir out')
    if not (args.job_dir or args.output_dir):
        raise UserError('give --job_dir, a folder that all nodes share, for instance $HOME/experiments/%j')
    return str(Path(args.job_dir or args.output_dir).resolve())


def job_parameters(args: Namespace) -> dict[str, object]:
    """Return the parameters of the job for submitit; raise UserError for impossible numbers."""
    check_bounds(args, get_submit_parser())
    tasks = args.tasks_per_node or max(args.ngpus, 1)
    if args.ngpus and tasks != args.ngpus:
        raise UserError(
            f'--tasks_per_node {tasks} differs from --ngpus {args.ngpus}: each GPU needs one process'
        )
    if args.signal_delay >= 60 * args.timeout:
        raise UserError(
            f'--signal_delay {args.signal_delay} seconds are not less than --timeout {args.timeout} minutes'
        )
    parameters = {
        'name': args.job_name,
        'nodes': args.nodes,
        'tasks_per_node': tasks,
        'gpus_per_node': args.ngpus or None,
        'cpus_per_task': args.cpus_per_task,
        'mem_gb': args.mem_gb or 40 * args.ngpus or None,
        'timeout_min': args.timeout,
        'slurm_signal_delay_s': args.signal_delay,
        # Otherwise the other tasks would wait for a task that failed.
        'slurm_srun_args': ['--kill-on-bad-exit=1'],
        # Some clusters start a job again only if it asks for it.
        'slurm_additional_parameters': {'requeue': True},
        **{f'slurm_{name}': getattr(args, name) for name in CLUSTER_FLAGS},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def check_script(folder: str, parameters: dict[str, object]) -> None:
    """Refuse values that would start a new line in the script for sbatch, which a shell runs.

    Raises:
        UserError: a value has a line break or another control character.
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
    return executor.submit(Training(args, given_of(args))).job_id


if __name__ == '__main__':
    run_command(lambda args: f'Submitted job_id: {submit(args)}', get_submit_parser())
