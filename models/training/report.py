"""Report the supervision of each kind of prediction: a table before a run, and statistics of an epoch."""

import re
from collections import Counter

from .structures import Supervision


def supervision_table(
    table: dict[str, Supervision], num_queries: dict[str, int], weight_dict: dict[str, float]
) -> str:
    """Describe each kind that has coefficients in a line: its queries, layers, matcher, loss coefficients and divisor."""
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
    """Return the kind of prediction that a loss belongs to, by its official name.

    The own losses of Co-DETR's heads belong to the kind of the queries made from their positives.
    """
    parts = ['rcnn' if part == 'rpn' else part for part in name.split('_')]
    return next((part for part in parts if part in table), 'one2one')


def epoch_statistics(
    table: dict[str, Supervision], weight_dict: dict[str, float], tally: Counter, averages: dict[str, float]
) -> dict[str, float]:
    """Return pairs per object (mean over layers), `positives_KIND`, and share of the total loss, `share_KIND`.

    Args:
        tally: number of pairs of each kind, and of `objects`.
        averages: average of each loss term by its name.
    """
    shares: Counter[str] = Counter()
    for name, value in averages.items():
        if name in weight_dict:
            shares[kind_of(name, table)] += weight_dict[name] * value
    total = sum(shares.values())
    kinds = [kind for kind in table if kind in tally]
    positives = {f'positives_{kind}': tally[kind] / max(tally['objects'], 1) for kind in kinds}
    return positives | {f'share_{kind}': shares[kind] / total if total else 0.0 for kind in kinds}


def statistics_text(metrics: dict[str, float]) -> str:
    """Describe `epoch_statistics` in one line, '' for a single kind. Names may have the prefix `train_`."""
    found = {name.removeprefix('train_'): value for name, value in metrics.items()}
    kinds = [name.removeprefix('positives_') for name in found if name.startswith('positives_')]
    if len(kinds) < 2:
        return ''
    texts = (
        f'{kind} {found[f"positives_{kind}"]:.2f}, {100 * found[f"share_{kind}"]:.0f} %' for kind in kinds
    )
    return f'queries per object and share of the loss: {"; ".join(texts)}'
