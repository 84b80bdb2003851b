"""Report how each kind of prediction is supervised: a table before a run, and statistics of an epoch."""

import re

from .criterion import Supervision, loss_suffixes


def supervision_table(
    table: dict[str, Supervision], num_queries: dict[str, int], weight_dict: dict[str, float]
) -> str:
    """Describe each kind that has coefficients in a line: queries, matcher, coefficients and divisor."""
    rows = []
    for kind, row in table.items():
        (suffix,) = loss_suffixes(kind, 1)
        coef = {term: weight_dict.get(f'loss_{term}{suffix}') for term in row.coef}
        if None in coef.values():
            continue
        first = rf'loss_{next(iter(row.coef), "ce")}(_\d+)?{suffix}'
        layers = sum(re.fullmatch(first, name) is not None for name in weight_dict)
        origin = f'{num_queries[kind]} queries' if kind in num_queries else row.description
        if row.matcher is None:
            rule, divisor = 'known in advance', 'its own count'
        else:
            repeats = row.matcher.count([1])
            rule, divisor = str(row.matcher), 'objects' if repeats == 1 else f'{repeats:g} x objects'
        losses = ' + '.join(f'{value:g} {term}' for term, value in coef.items())
        scale = '' if row.scale == 1 else f', all x {row.scale:g}'
        rows.append(
            (kind, origin, f'{layers} x' if layers > 1 else '', rule, f'({losses}) / {divisor}{scale}')
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return ('\n' + 16 * ' ').join(lines)


def statistics_text(metrics: dict[str, float]) -> str:
    """Describe `SetCriterion.statistics` in one line, '' for a single kind. Names may begin with `train_`."""
    found = {name.removeprefix('train_'): value for name, value in metrics.items()}
    kinds = [name.removeprefix('positives_') for name in found if name.startswith('positives_')]
    if len(kinds) < 2:
        return ''
    texts = (
        f'{kind} {found[f"positives_{kind}"]:.2f}, {100 * found[f"share_{kind}"]:.0f} %' for kind in kinds
    )
    return f'queries per object and share of the loss: {"; ".join(texts)}'
