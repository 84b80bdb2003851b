"""
Measure inference (`model`), a training step without optimizer (`train`), and its losses (`criterion`).

The operator runs on its kernels and on grid_sample; with `--against DIR` in two checkouts of this repository.
"""

import argparse

import torch
from torch import Tensor

from models.ops.functions import use_implementation
from tools.benchmarks import common
from tools.benchmarks.checkouts import build_case

HELP = {
    'model': 'inference of two-stage Deformable DETR',
    'train': 'a training step of H-Deformable-DETR',
    'criterion': 'matching and losses of H-Deformable-DETR, forward and backward',
}
SIZES = {'model': (1, 480, 640), 'train': (2, 384, 512), 'criterion': (2, 800, 1333)}
OBJECTS = {'model': 7, 'train': 7, 'criterion': 20}
# The model of `criterion` is narrow; its predictions have the number and size of real ones.
FLAGS = {
    'model': common.MODELS['Deformable DETR, two stages'],
    'train': common.TRICKS | common.HYBRID,
    'criterion': common.TRICKS
    | common.HYBRID
    | {'backbone': 'resnet18', 'hidden_dim': 32, 'enc_layers': 1, 'dim_feedforward': 32},
}


def add_command(commands: argparse._SubParsersAction) -> None:
    for task, text in HELP.items():
        parser = commands.add_parser(task, help=text)
        common.add_flags(parser, rounds=7, size=SIZES[task], against=True)
        parser.add_argument('--objects', default=OBJECTS[task], type=int, help='objects in each image')
        parser.set_defaults(run=benchmark_case, task=task)


def benchmark_case(args: argparse.Namespace) -> None:
    common.start(args, HELP[args.task].capitalize())
    inputs = common.detector_inputs(args, args.task, args.objects, **FLAGS[args.task])
    if args.against:
        common.compare_checkouts(args, [(args.task, inputs)])
        return
    call = build_case(inputs)

    def call_on_grid_sample() -> tuple[Tensor, ...]:
        with use_implementation('pytorch'):
            return call()

    contenders = {'kernels': call}
    if args.task != 'criterion':  # it does not call the operator
        contenders['grid_sample'] = call_on_grid_sample
    torch.testing.assert_close(call_on_grid_sample(), call(), rtol=1e-3, atol=1e-3)
    common.print_times(common.time_in_turn(contenders, args.rounds, args.device))
