"""
The table of docs/zoo.md: published weights, with the size of each model.

`python -m tests.zoo_table` prints it.

Rows are in `util/config/recipes.py`. `hubconf.py` has an entry for each with a name; `main.py --model` and
`tools/predict.py --model` take the same names.
"""

import torch

from models.costs import count_flops
from models.hub import build_row
from util.config.recipes import ZOO, Row


def counts(row: Row, height: int = 800, width: int = 1136) -> tuple[int, float]:
    """Return parameters and multiply-adds (1e9) of a row's detector for one image, without building it."""
    if row.recipe.flags.backbone == 'vit_large_lsj':
        height = width = row.recipe.flags.img_size
    with torch.device('meta'):
        model, _ = build_row(row)
    return sum(p.numel() for p in model.parameters()), count_flops(model, height, width) / 2e9


def table() -> str:
    """Return the table of docs/zoo.md."""
    lines = [
        '| model | epochs | AP | parameters, M (published) | GFLOPs (published) | hub entry | recipe | '
        'weights |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    known: dict[str, tuple[int, float]] = {}
    for row in ZOO:
        recipe, key = row.recipe, row.network
        parameters, gflops = known[key] = known.get(key) or counts(row)
        published = [f' ({value})' for value in row.size] if row.size else ['', '']
        where = f'[file]({row.weights})' if row.weights else row.linked.replace('the ', '', 1)
        entry, script = (f'`{name}`' if name else '' for name in (row.name, row.script))
        title = row.title or recipe.title + ' (LVIS)' * (recipe.data == 'LVIS v1 val')
        cells = (
            title,
            recipe.epochs,
            row.ap or recipe.ap or 'not published',
            f'{parameters / 1e6:.1f}{published[0]}',
            f'{gflops:.0f}{published[1]}',
            entry,
            script,
            where,
        )
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(table())
