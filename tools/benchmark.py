"""
Measure the speed of parts of the code. The contenders of a comparison must first agree in their results; then
they run in turn.

    python tools/benchmark.py data          loading of drawn images, or of those in --coco_path DIR
    python tools/benchmark.py op            deformable attention, forward and backward
    python tools/benchmark.py model         inference of two-stage Deformable DETR
    python tools/benchmark.py train         a training step of H-Deformable-DETR
    python tools/benchmark.py criterion     matching and losses of H-Deformable-DETR
    python tools/benchmark.py fps           inference of each method, in images a second
    python tools/benchmark.py step          a training step of each method in each precision
    python tools/benchmark.py profile       where the time of a training step goes

`data`, `op`, `model`, `criterion` and `train` compare this code with another checkout of it by `--against DIR`:

    git worktree add ../before COMMIT && (cd ../before && bash scripts/build_ops.sh)
    python tools/benchmark.py op --against ../before
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.benchmarks import cases, data, inference, op, step
from util.command_line import FlagParser, run_command


def get_args_parser() -> FlagParser:
    parser = FlagParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for part in (data, op, cases, inference, step):
        part.add_command(commands)
    return parser


if __name__ == '__main__':
    run_command(lambda args: args.run(args), get_args_parser())
