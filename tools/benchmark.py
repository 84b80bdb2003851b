"""
Measure the speed of parts. All contenders of a comparison run in one process in turn, and must first agree in
their results.

    python tools/benchmark.py data          loading images that it draws itself, or of --coco_path DIR
    python tools/benchmark.py op            deformable attention, forward and backward
    python tools/benchmark.py model         inference of two-stage Deformable DETR
    python tools/benchmark.py fps           inference of each method, in images a second
    python tools/benchmark.py criterion     matching and losses of H-Deformable-DETR
    python tools/benchmark.py train         a training step of H-Deformable-DETR
    python tools/benchmark.py step          a training step of each method in each precision
    python tools/benchmark.py profile       where the time of a training step goes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.benchmarks import data, inference, op, reference_criterion, step, trace
from util.flags import FlagParser, run_command


def get_args_parser() -> FlagParser:
    parser = FlagParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for part in (data, op, inference, reference_criterion, step, trace):
        part.add_command(commands)
    return parser


if __name__ == '__main__':
    run_command(lambda args: args.run(args), get_args_parser())
