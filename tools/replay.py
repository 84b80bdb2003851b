"""
Run the batch of a skipped step again, and report where the first value that is not finite appears.

  python tools/replay.py OUT/black_box/epoch_1_5_step_12_rank0.pth
  python tools/replay.py FILE --amp off        in float32: is the precision the reason?

Training saves such a file when a step has a gradient that is not finite. It holds batch, random states, flags
and weights of a process.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from engine import losses_of
from models import build_model
from models.weights.load import load_checkpoint
from models.weights.read import read_checkpoint
from util.command_line import FlagParser, run_command
from util.distributed.collectives import choose_device
from util.errors import UserError
from util.nan_guard import Diagnosis, diagnose
from util.nested_tensor import NestedTensor
from util.precision import DTYPES, Precision
from util.seeding import set_rng_state


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('replay.py', description=__doc__)
    parser.add_argument('file', help='file in OUT/black_box')
    parser.add_argument('--amp', choices=DTYPES, help='precision (default: that of the run)')
    parser.add_argument('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    return parser


def replay(args: argparse.Namespace) -> Diagnosis:
    """Return where the first value that is not finite appears in a saved step.

    Raises:
        UserError: the file does not hold such a step.
    """
    saved = read_checkpoint(args.file)
    missing = {'model', 'args', 'rng', 'batches', 'where'} - saved.keys()
    if missing:
        raise UserError(
            f'{args.file} is not a step that a training saved in black_box/: it lacks '
            f'{", ".join(sorted(missing))}'
        )
    flags = argparse.Namespace(**saved['args'] | {'backbone_weights': 'none'})
    model, criterion, _ = build_model(flags)
    load_checkpoint(model, {'model': saved['model'], 'args': saved['args']}, resume=True, name=args.file)
    device = choose_device(args.device)
    model.to(device).train()
    batches = [(NestedTensor(each['tensors'], each['mask']), each['targets']) for each in saved['batches']]
    step_targets = [targets for _, targets in batches]
    set_rng_state(saved['rng'])
    precision = Precision(args.amp or flags.amp, device)
    return diagnose(model, batches, partial(losses_of, model, criterion, precision, step_targets))


def main(args: argparse.Namespace) -> str:
    torch.set_grad_enabled(True)
    return str(replay(args))


if __name__ == '__main__':
    run_command(main, get_args_parser())
