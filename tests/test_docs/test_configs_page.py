"""``docs/configs.md``: each snippet is a config, and each table under it states its values."""

import ast
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
from commands import ROOT
from mmengine.config import Config

import dino_mm

PAGE = (ROOT / 'docs/configs.md').read_text()
FILE = re.compile(r'```python\n# (\w+\.py)\n(.*?)```', re.DOTALL)
ROW = re.compile(r'^\| `([\w.]+)` \| `([^`]+)` \| ', re.MULTILINE)
R50 = 'dino_r50_4scale_12ep'


def snippets() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Name and text of each config, and the rows (key, value) that follow it."""
    found = list(FILE.finditer(PAGE))
    for match, following in zip(found, [*found[1:], None], strict=True):
        end = following.start() if following else len(PAGE)
        yield match[1], match[2], ROW.findall(PAGE, match.end(), end)


def value(config: Config, key: str) -> object:
    """The value of a dotted key."""
    return reduce(lambda node, part: node[int(part)] if part.isdigit() else node[part], key.split('.'), config)


@pytest.mark.parametrize(('name', 'text', 'rows'), list(snippets()), ids=[name for name, _, _ in snippets()])
def test_tables_state_the_values_of_the_snippets(
    name: str, text: str, rows: list[tuple[str, str]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    config = Config.fromfile(tmp_path / name)
    assert {key: value(config, key) for key, _ in rows} == {key: ast.literal_eval(stated) for key, stated in rows}
    if name == 'leaf.py':
        assert config.to_dict() == dino_mm.get_config(R50).to_dict()


def test_each_part_of_the_model_is_explained() -> None:
    keys = {key.split('.')[1] for _, _, rows in snippets() for key, _ in rows if key.startswith('model.')}
    assert keys == set(dino_mm.get_config(R50).model)
    assert sum(len(rows) for _, _, rows in snippets()) > 50


def test_the_chain_is_that_of_the_files() -> None:
    (chain,) = re.findall(r'^(dino-swin/\S+\.py)\n((?:[├└│ ].*\n)+)', PAGE, re.MULTILINE)
    leaf, lines = chain
    configs = ROOT / 'configs'
    stated = [re.search(r'(_base_/\S+)', line)[1] for line in lines.splitlines()]

    def bases(path: Path) -> list[str]:
        text = re.search(r"_base_ = (\[.*?\]|'.*?')", path.read_text(), re.DOTALL)
        found = ast.literal_eval(text[1]) if text else []
        own = [path.parent / base for base in ([found] if isinstance(found, str) else found)]
        return [line for base in own for line in (str(base.resolve().relative_to(configs)), *bases(base))]

    assert stated == bases(configs / leaf)
