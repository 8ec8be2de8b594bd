"""Each promise of docs/reliability.md has a test that exists."""

import re

from commands import ROOT

NAME = re.compile(r'`(test_\w+)(\.py)?`')


def test_each_promise_names_tests_that_exist() -> None:
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    rows = [line.split('|')[1:4] for line in page.splitlines() if line.startswith('| ')][1:]
    promises = [row for row in rows if 'test_' in row[1]]
    assert len(promises) >= 20
    files = {path.name: path.read_text() for path in (ROOT / 'tests').rglob('test_*.py')}
    functions = {name for text in files.values() for name in re.findall(r'^def (test_\w+)', text, re.MULTILINE)}
    for promise, tests, _ in promises:
        for name, suffix in NAME.findall(tests):
            assert name + suffix in (files if suffix else functions), f'{promise}: {name}{suffix}'
