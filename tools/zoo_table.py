"""Write the model tables of ``configs/*/README.md`` and ``docs/model_zoo.md``: ``python tools/zoo_table.py [FOLDER]``.

What a row states comes from the folder's ``metafile.yml``; parameters and FLOPs are measured, on the meta device, so no
weights and little memory are needed. A table replaces what is between the two markers.
"""

import argparse
import re
from pathlib import Path

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
import torch
import yaml
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dino_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
OVERVIEW = ROOT / 'docs' / 'model_zoo.md'
#: Families in the order of the overview.
FOLDERS = [
    ROOT / 'configs' / f'dino-{family}'
    for family in ('resnet', 'swin', 'focal', 'vitdet', 'convnext', 'internimage', 'eva-01')
]
START, END = '<!-- zoo table -->', '<!-- end of zoo table -->'
HEIGHT, WIDTH = 800, 1280
COLUMNS = (
    'config',
    'backbone',
    'pretrained on',
    'epochs',
    'denoising queries',
    'box AP as reported by detrex',
    'parameters (M)',
    'GFLOPs',
    'checkpoint',
    'checked here',
)


def build(config: str) -> nn.Module:
    """The model of a config, on the meta device."""
    with torch.device('meta'):
        return MODELS.build(Config.fromfile(ROOT / config).model)


def count_parameters(model: nn.Module) -> int:
    """Parameters, frozen ones and the affine ones of frozen norms included."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module) -> int:
    """FLOPs of detecting in one image: matrix products, convolutions and attention, two for a multiply-add."""
    shape = (HEIGHT, WIDTH)
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape))
    model.eval().requires_grad_(False)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *shape), [sample], mode='tensor')
    return counter.get_total_flops()


def row(entry: dict) -> dict[str, str]:
    """What a metafile's entry states of a model, by column."""
    facts, name = entry['Metadata'], entry['Name']
    results = entry.get('Results')
    weights = entry.get('Weights')
    return {
        'config': f'[{name}]({Path(entry["Config"]).name})',
        'backbone': facts['Backbone'],
        'pretrained on': facts['Pretraining'],
        'epochs': str(facts['Epochs']),
        'denoising queries': str(facts['Denoising Queries']),
        'box AP as reported by detrex': str(results[0]['Metrics']['box AP']) if results else '-',
        'checkpoint': f'[detrex]({weights})' if weights else '-',
        'checked here': facts['Checked'],
    }


def measured(entry: dict) -> dict[str, str]:
    """What is measured of a model, by column."""
    model = build(entry['Config'])
    return {
        'parameters (M)': f'{count_parameters(model) / 1e6:.1f}',
        'GFLOPs': f'{count_flops(model) / 1e9:.0f}',
    }


def overview_row(entry: dict) -> dict[str, str]:
    """As :func:`row`, of the table of all models: seen from ``docs/``, without what is measured."""
    stated = row(entry)
    link = {'config': f'[{Path(entry["Config"]).parent.name}/{entry["Name"]}](../{entry["Config"]})'}
    return {column: (stated | link)[column] for column in COLUMNS if column in stated}


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows by column as Markdown."""
    lines = ['| ' + ' | '.join(rows[0]) + ' |', '|' + '---|' * len(rows[0])]
    lines += ['| ' + ' | '.join(cells.values()) + ' |' for cells in rows]
    return '\n'.join(lines)


def parse_table(text: str) -> list[dict[str, str]]:
    """The rows by column of a document's table."""
    header, _, *lines = [
        line.strip('| ').split(' | ') for line in text.split(START)[1].split(END)[0].strip().splitlines()
    ]
    return [dict(zip(header, line, strict=True)) for line in lines]


def entries_of(folder: Path) -> list[dict]:
    """The models of a folder's metafile."""
    return yaml.safe_load((folder / 'metafile.yml').read_text())['Models']


def write_table(folder: Path) -> None:
    """Measure a folder's models, and replace the table in its README."""
    rows = [row(entry) | measured(entry) for entry in entries_of(folder)]
    replace_table(folder / 'README.md', [{column: cells[column] for column in COLUMNS} for cells in rows])


def write_overview(folders: list[Path]) -> None:
    """Replace the table of all models that detrex reports an AP of."""
    published = [entry for folder in folders for entry in entries_of(folder) if 'Results' in entry]
    replace_table(OVERVIEW, [overview_row(entry) for entry in published])


def replace_table(document: Path, rows: list[dict[str, str]]) -> None:
    """Write ``rows`` between the markers of a document."""
    table = f'{START}\n{format_table(rows)}\n{END}'
    text, count = re.subn(f'{START}.*{END}', lambda _: table, document.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f'{document} has no place for the table: add the lines `{START}` and `{END}`.')
    document.write_text(text)


def main() -> None:
    """Parse the command line and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', metavar='FOLDER', help='such as configs/dino-swin; by default all')
    folders = [Path(name).resolve() for name in parser.parse_args().folders]
    for folder in folders or FOLDERS:
        write_table(folder)
        print(f'{folder.name}/README.md')
    write_overview(FOLDERS)
    print(OVERVIEW.relative_to(ROOT))


if __name__ == '__main__':
    main()
