"""The table of tools/benchmark.py scaling: its formulas on hand-made cases, and that it measures and prints."""

import math

import pytest
import torch

from tools import benchmark
from tools.benchmarks import scaling, scaling_formulas, scaling_inputs
from tools.benchmarks.scaling_formulas import Links, Saving

TINY = {
    'backbone': 'resnet10', 'backbone_weights': 'none', 'hidden_dim': 32, 'nheads': 4, 'enc_layers': 1, 'dec_layers': 1,
    'dim_feedforward': 64, 'num_queries': 10,
}  # fmt: skip
LINKS = Links(node_gpus=8, in_node=4e11, between_nodes=5e10, hop=0.0)


def sent_in_a_ring(world: int, chunks: int) -> int:
    """Chunks that a process sends until all hold the sum of every chunk, played through."""
    held = [[{rank} for _ in range(chunks)] for rank in range(world)]
    sent, everyone = 0, set(range(world))
    while any(part != everyone for rank in held for part in rank):
        moving = [(rank, (rank - sent) % world) for rank in range(world)]
        parts = [set(held[rank][chunk]) for rank, chunk in moving]
        for (rank, chunk), part in zip(moving, parts, strict=True):
            held[(rank + 1) % world][chunk] |= part
        sent += 1
    return sent


@pytest.mark.parametrize('world', [2, 5, 8])
def test_volume_of_a_ring_is_that_of_one_played_through(world: int) -> None:
    payload = 1000.0 * world
    assert scaling_formulas.ring_bytes(world, payload) == sent_in_a_ring(world, world) * payload / world


def test_fsdp_sends_half_as_much_again_as_ddp() -> None:
    assert scaling_formulas.fsdp_bytes(64, 1e9, 1e9) == pytest.approx(
        1.5 * scaling_formulas.ring_bytes(64, 1e9)
    )


def test_units_of_links() -> None:
    """A card carries its share of what leaves a node: 8 cards of 50 GB/s for 2 x 3/4 of 1 GB between 4 nodes."""
    assert scaling_formulas.all_reduce_seconds(8, 1e9, LINKS) == pytest.approx(2 * 7 / 8 / 400)
    slow = Links(8, in_node=1e15, between_nodes=5e10, hop=0.0)
    assert scaling_formulas.all_reduce_seconds(32, 1e9, slow) == pytest.approx(2 * 3 / 4 / 400)
    assert scaling_formulas.all_reduce_seconds(1, 1e9, LINKS) == 0
    assert scaling_formulas.tree_latency(4096, Links(8, 1.0, 1.0, hop=1e-5)) == pytest.approx(24e-5)


def test_all_but_the_last_bucket_hides_behind_the_backward_pass() -> None:
    bucket = scaling_formulas.all_reduce_seconds(64, 25e6, LINKS)
    assert scaling_formulas.exposed_seconds(64, 100e6, 25e6, 1.0, LINKS) == pytest.approx(bucket)
    assert scaling_formulas.exposed_seconds(64, 100e6, 25e6, 0.0, LINKS) == pytest.approx(4 * bucket)
    assert scaling_formulas.exposed_seconds(64, 1e6, 25e6, 0.0, LINKS) < bucket, 'less than a bucket'


@pytest.mark.parametrize('cost, mtbf', [(3.0, 44_500.0), (60.0, 6_000.0)])
def test_best_interval_loses_least(cost: float, mtbf: float) -> None:
    saving = Saving(cost, restart=300.0, mtbf=mtbf)
    best = saving.best_interval()
    others = [best * factor for factor in (0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2, 10)]
    assert all(saving.lost_share(best) < saving.lost_share(other) for other in others)
    assert saving.lost_share(best) == pytest.approx(math.sqrt(2 * cost / mtbf) + 300 / mtbf)
    assert Saving(cost, 300.0, mtbf=1.0).lost_share(best) == 1, 'no more than everything'


def test_failures_of_the_published_run() -> None:
    hours = scaling_formulas.job_mtbf(16384, scaling.LLAMA3_MTBF_HOURS)
    assert hours * 419 == pytest.approx(54 * 24)


def test_waiting_for_the_largest_batch() -> None:
    same = torch.tensor([[480, 640]])
    assert scaling_formulas.waiting(same, 8, 2, bucketed=False) == pytest.approx((0, 1))
    sizes = torch.tensor([[100, 100], [100, 300]])
    padding, slowest = scaling_formulas.waiting(sizes, 64, 1, bucketed=False)
    assert padding == 0 and slowest == pytest.approx(300 / 200, rel=0.05), 'one of 64 has the larger'
    assert scaling_formulas.waiting(sizes, 64, 1, bucketed=True)[1] < 1.05
    assert scaling_formulas.waiting(sizes, 64, 2, bucketed=False)[0] == pytest.approx(0.2, abs=0.05)


def test_sizes_of_a_saved_model() -> None:
    """Float32 weights; two moments a trained number and a counter a tensor; all of them in the file."""
    m = scaling_inputs.measure_model(TINY, None)
    assert 0 < m.gradients <= m.parameters and m.gradients % 4 == 0
    assert 2 * m.gradients < m.optimizer < 2.01 * m.gradients
    assert m.parameters <= m.averaged <= m.parameters + m.buffers, 'some buffers are not saved'
    assert m.optimizer + 2 * m.averaged < m.file < 1.02 * (m.optimizer + 2 * m.averaged)
    assert 0 < m.save <= m.durable and m.read > 0


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(scaling.MODELS, 'detr', TINY)
    monkeypatch.setattr(scaling, 'import_seconds', lambda: 1.0)
    monkeypatch.setattr(scaling.torch, 'set_num_threads', lambda count: None)  # of the other tests' threads
    command = 'scaling --models detr --gpus 2 1024 --num_images 4 --rounds 1 --gpu_ms detr=100 --write_mb 1'
    args = benchmark.get_args_parser().parse_args(command.split())
    args.run(args)
    lines = capsys.readouterr().out.splitlines()
    rows = {line[6:65].strip(): line[65:].split() for line in lines if line.startswith('  ')}
    assert rows['hours between failures'] == ['25,339', '49.5']
    assert rows['images a step'] == ['4', '2,048']
    assert float(rows['step, ms'][0]) >= 200, 'two images of 100 ms'
    assert len(rows['days for 1,000,000,000 images']) == 2
    sent = float(rows['DDP: MB sent a GPU and step'][0])
    file = 1e3 * float(rows['checkpoint, GB'][0])
    assert 4 * sent < file < 5 * sent, 'weights, their average and two moments a trained number'
    assert float(rows['seconds of saving, all wait for rank 0'][0]) == pytest.approx(file, rel=0.01)


@pytest.mark.parametrize(
    'flags', ['--gpu_ms yolo=3', '--gpu_ms detr', '--gpus 1', '--mtbf_hours 0', '--folder /nowhere']
)
def test_flags_are_checked(flags: str) -> None:
    args = benchmark.get_args_parser().parse_args(['scaling', *flags.split()])
    with pytest.raises(ValueError, match=flags.split()[0]):
        args.run(args)
