"""Hooks of ``mkdocs build``: what the site has besides the pages in ``docs/``.

The pages link to files of the repository, as its own web view wants it. On the site these links become the file's
path, and a link to a file that is missing stops ``mkdocs build --strict``.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'\[([^]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)')
FENCE = re.compile(r'(^```.*?^```$)', re.MULTILINE | re.DOTALL)
#: Parts of the package in the order of the reference, with the heading of each.
ROOMS = {
    'zoo': 'Configs and models by name',
    'models': 'Parts of the detector',
    'datasets': 'Data sets and transforms',
    'evaluation': 'Evaluation',
    'engine': 'Training',
    'inference': 'Prediction',
    'export': 'Export',
}
log = logging.getLogger('mkdocs.plugins.dino_mm')


def made_pages() -> dict[str, str]:
    """Files of the repository that are pages of the site too: path in the repository -> path in ``docs/``."""
    families = {f'configs/{p.parent.name}/README.md': f'families/{p.parent.name}.md' for p in _family_pages()}
    return families | {'CHANGELOG.md': 'changelog.md'}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in ``docs/`` has."""
    for source, target in made_pages().items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    files.append(File.generated(config, 'reference.md', content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to files of the repository to their pages, or write the path in place of the link."""
    made = {target: source for source, target in made_pages().items()}
    source = made.get(page.file.src_uri, f'docs/{page.file.src_uri}')
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: _link(m, source, page.file.src_uri), part) for part in parts[::2]]
    return ''.join(parts)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Drop the roles of docstrings, such as ``:class:``, which the reference does not know."""
    return re.sub(r':(?:class|func|meth|data|mod):(?=<code)', '', html) if page.file.src_uri == 'reference.md' else html


def reference() -> str:
    """The page of all public names with their docstrings."""
    rooms: dict[str, list[str]] = {}
    for name, module in public_names().items():
        rooms.setdefault(module.split('.')[0], []).append(name)
    for room in ('shipped', 'checkpoints'):
        rooms['zoo'] += rooms.pop(room, [])
    if set(rooms) != set(ROOMS):
        log.warning('The reference has no heading for %s: see ROOMS.', sorted(set(rooms) ^ set(ROOMS)))
    lines = [
        '# Docstrings',
        '',
        'All public names, made from the source. [Overview](api.md).',
    ]
    for room, heading in ROOMS.items():
        lines += ['', f'## {heading}']
        for name in sorted(rooms.get(room, []), key=str.lower):
            lines += ['', f'::: dino_mm.{name}']
    return '\n'.join(lines) + '\n'


def public_names() -> dict[str, str]:
    """Name of ``dino_mm.__all__`` -> module in the package that it comes from, read without importing anything."""
    tree = ast.parse((ROOT / 'dino_mm' / '__init__.py').read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    origin = {alias.name: str(node.module) for node in imports for alias in node.names}
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'
    )
    return {name: origin[name] for name in names if not name.startswith('_')}


def _family_pages() -> list[Path]:
    return sorted((ROOT / 'configs').glob('*/README.md'))


def _link(match: re.Match[str], source: str, page: str) -> str:
    """One link of the file ``source`` as the site's ``page`` has it."""
    text, target, anchor = match[1], match[2], match[3] or ''
    if re.match(r'[a-z]+:', target):
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = made_pages().get(path) or (path.removeprefix('docs/') if path.startswith('docs/') else None)
    if inside is not None:
        return f'[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or ".")}{anchor})'
    if not (ROOT / path).exists():
        log.warning("%s links to '%s', which does not exist.", source, target)
    return f'`{path}`' if text.strip('`') in path else f'{text} (`{path}`)'
