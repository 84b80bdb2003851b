"""Who is supervised how: a table before a run, and what each kind of prediction did in an epoch."""

import re
from collections import Counter

from .structures import Supervision


def supervision_table(
    table: dict[str, Supervision], num_queries: dict[str, int], weight_dict: dict[str, float]
) -> str:
    """A line for each kind that has coefficients: its predictions, who assigns, what the sums are divided by, and the
    coefficients of its last layer.
    """
    rows = []
    for kind, row in table.items():
        suffix = '' if kind == 'one2one' else f'_{kind}'
        coef = {term: weight_dict.get(f'loss_{term}{suffix}') for term in row.coef}
        first = next(iter(row.coef), 'ce')
        layers = sum(re.fullmatch(rf'loss_{first}(_\d+)?{suffix}', name) is not None for name in weight_dict)
        if None in coef.values():
            continue
        source = f'{num_queries[kind]} queries' if kind in num_queries else row.source
        if row.matcher is None:
            rule, divisor = 'known in advance', 'its own count'
        else:
            repeats = row.matcher.count([1])
            rule, divisor = str(row.matcher), 'objects' if repeats == 1 else f'{repeats:g} x objects'
        losses = ' + '.join(f'{value:g} {term}' for term, value in coef.items())
        scale = '' if row.scale == 1 else f', all x {row.scale:g}'
        rows.append(
            (kind, source, f'{layers} x' if layers > 1 else '', rule, f'({losses}) / {divisor}{scale}')
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return ('\n' + 16 * ' ').join(lines)


def kind_of(name: str, table: dict[str, Supervision]) -> str:
    """Kind of prediction that a loss belongs to, by its official name. What a head of Co-DETR loses by itself counts as
    its queries'.
    """
    parts = ['rcnn' if part == 'rpn' else part for part in name.split('_')]
    return next((part for part in parts if part in table), 'one2one')


def epoch_ledger(
    table: dict[str, Supervision], weight_dict: dict[str, float], tally: Counter, averages: dict[str, float]
) -> dict[str, float]:
    """`positives_KIND`: pairs an object (mean of layers); `share_KIND`: of the total loss.

    tally: pairs of each kind, and `objects`; averages: loss terms, by name.
    """
    shares: Counter[str] = Counter()
    for name, value in averages.items():
        if name in weight_dict:
            shares[kind_of(name, table)] += weight_dict[name] * value
    total = sum(shares.values())
    kinds = [kind for kind in table if kind in tally]
    positives = {f'positives_{kind}': tally[kind] / max(tally['objects'], 1) for kind in kinds}
    return positives | {f'share_{kind}': shares[kind] / total if total else 0.0 for kind in kinds}


def ledger_text(metrics: dict[str, float]) -> str:
    """The same as one line, '' for a single kind; names may have `train_` in front."""
    found = {name.removeprefix('train_'): value for name, value in metrics.items()}
    kinds = [name.removeprefix('positives_') for name in found if name.startswith('positives_')]
    if len(kinds) < 2:
        return ''
    texts = (
        f'{kind} {found[f"positives_{kind}"]:.2f} and {100 * found[f"share_{kind}"]:.0f} %' for kind in kinds
    )
    return f'queries an object and share of the loss: {", ".join(texts)}'
