"""The README and the pages: links, commands, figures, and the snippets that a newcomer tries first."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from commands import ROOT
from conftest import tiny_model_cfg
from mmengine.config import Config

import dino_mm
from dino_mm.cli import COMMANDS
from dino_mm.registry import MODELS

README = ROOT / 'README.md'
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [README, ROOT / 'CHANGELOG.md', *DOCS, *sorted((ROOT / 'configs').glob('*/README.md'))]
each_page = pytest.mark.parametrize('page', PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


def blocks(page: Path, kind: str) -> list[str]:
    """The code blocks of a kind."""
    return re.findall(rf'^```{kind}\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of ours on a page: the tool's file name, or '' where a command has none, and its options."""
    for line in '\n'.join(blocks(page, 'bash') + blocks(page, 'console')).replace('\\\n', ' ').splitlines():
        words = shlex.split(line.removeprefix('$ '), comments=True)
        for i, word in enumerate(words):
            if word == 'dino-mm' and i + 1 < len(words) and not words[i + 1].startswith('-'):
                yield COMMANDS[words[i + 1]].tool, options(words[i + 2 :])
            elif re.match(r'(\./)?tools/\w+\.(py|sh)$', word):
                yield Path(word).name, options(words[i + 1 :])


def options(words: list[str]) -> list[str]:
    """Options among the words of a command, up to what the shell does with its output."""
    end = next((i for i, word in enumerate(words) if word in ('|', '&&', ';', '>')), len(words))
    return [word.split('=')[0] for word in words[:end] if word.startswith('--')]


@each_page
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r'\]\(([^)\s#]+)[^)]*\)', text) if not re.match(r'\w+:', target)]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    known = {path.stem: path.read_text() for path in [*(ROOT / 'tools').glob('*.py')]}
    shared = (ROOT / 'dino_mm/engine/launch.py').read_text()
    for tool, given in commands(page):
        name = Path(tool).stem.removeprefix('dist_').removeprefix('slurm_')
        assert not tool or (ROOT / 'tools' / tool).is_file(), tool
        source = (known.get(name, '') + shared).replace('"', "'")
        stated = {option for option in given if re.search(rf"'(--)?{option[2:]}'", source)}
        unknown = set(given) - stated - {'--help', '--requeue'}
        assert unknown == set(), f'{page.name}: {tool}'


def test_every_page_is_in_the_navigation() -> None:
    def files(node: object) -> Iterator[str]:
        for part in node.values() if isinstance(node, dict) else node:
            yield from [part] if isinstance(part, str) else files(part)

    listed = sorted(files(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']))
    families = [f'families/{path.parent.name}.md' for path in (ROOT / 'configs').glob('*/README.md')]
    assert listed == sorted([*(p.name for p in DOCS), *families, 'changelog.md', 'reference.md'])


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert [page.name for page in DOCS if f'](docs/{page.name})' not in text] == []


def test_readme_states_the_ap_of_the_metafiles() -> None:
    rows = re.findall(
        r'^\| \[\w+\]\(configs/([\w-]+)/README\.md\) \|.*\| ([\d.]+) - ([\d.]+) \|$', README.read_text(), re.M
    )
    stated = {folder: (float(low), float(high)) for folder, low, high in rows}
    reported: dict[str, list[float]] = {}
    for path in (ROOT / 'configs').glob('*/metafile.yml'):
        for entry in yaml.safe_load(path.read_text())['Models']:
            found = [result['Metrics']['box AP'] for result in entry.get('Results', [])]
            reported.setdefault(path.parent.name, []).extend(found)
    assert stated == {folder: (min(found), max(found)) for folder, found in reported.items() if found}


@pytest.mark.parametrize('page', [README, ROOT / 'docs/index.md', ROOT / 'docs/predict.md'], ids=lambda page: page.name)
def test_snippets_of_prediction_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small detector in place of the zoo's, which finds something in every picture."""
    config = dino_mm.get_config('dino_digits')
    config.model = tiny_model_cfg()
    model = MODELS.build(config.model).eval()
    for branch in model.bbox_head.cls_branches:
        branch.bias.data.fill_(3.0)
    model.cfg, model.dataset_meta = config, dict(classes=tuple('abcde'))
    monkeypatch.setattr(dino_mm, 'get_model', lambda *_: model)
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Path('images').mkdir()
    for name in ('image.jpg', 'images/1.png'):
        cv2.imwrite(name, picture)
    video = cv2.VideoWriter('video.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 5, (128, 96))
    for _ in range(2):
        video.write(picture)
    video.release()
    ran = [block for block in blocks(page, 'python') if 'dino_mm.predict(' in block]
    assert len(ran) == 1
    exec(compile(ran[0], page.name, 'exec'), {})
    lines = capsys.readouterr().out.count('[')
    assert lines >= (1 if page.name == 'index.md' else 3)


def test_installation_lists_the_extras_of_the_package() -> None:
    (node,) = re.findall(r'^EXTRAS = (\{.*?^\})', (ROOT / 'setup.py').read_text(), re.MULTILINE | re.DOTALL)
    extras = ast.literal_eval(re.sub(r"'(cpu|gpu)': .*", '', node))
    stated = re.findall(r'^\| `([\w-]+)` \| ([\w, -]+) \| ', (ROOT / 'docs/installation.md').read_text(), re.MULTILINE)
    names = {extra: [re.match(r'[\w-]+', package)[0] for package in packages] for extra, packages in extras.items()}
    assert names.items() <= {extra: packages.split(', ') for extra, packages in stated}.items()
    assert len(names) == 5


def test_configs_of_the_readme_are_configs(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, 'python') if '_base_' in block]
    (tmp_path / 'own.py').write_text(text)
    assert Config.fromfile(tmp_path / 'own.py').model.bbox_head.num_classes == 3


@each_page
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, 'python'):
        ast.parse(block.replace('{{', '').replace('}}', ''))
