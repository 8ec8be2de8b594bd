"""A COCO file is read as what it means, or refused in words: a table of harmless quirks, one of faults, and the law."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from coco_cases import BACKENDS, BOXES, CLASSES, build, clean, evaluate, objects, perfect, write
from commands import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from PIL import Image

from dino_mm.datasets.coco_file import read_coco_file
from dino_mm.datasets.coco_rules import RULES, AnnotationError

Change = Callable[[dict[str, Any]], Any]


def each(kind: str, **values: Any) -> Change:
    """Set keys in every entry of a list; a callable makes the value from the old one, ``...`` removes the key."""

    def change(content: dict) -> None:
        for entry in content[kind]:
            for key, value in values.items():
                if value is ...:
                    entry.pop(key)
                else:
                    entry[key] = value(entry[key]) if callable(value) else value

    return change


def together(*changes: Change) -> Change:
    def change(content: dict) -> None:
        for one in changes:
            one(content)

    return change


def add(kind: str, **entry: Any) -> Change:
    return lambda content: content[kind].append(entry)


def texts(*kinds_and_keys: tuple[str, str]) -> Change:
    return together(*(each(kind, **{key: str}) for kind, key in kinds_and_keys))


def sizes(width: Any, height: Any) -> Change:
    return each('images', width=width, height=height)


def exchange(content: dict) -> None:
    for image in content['images']:
        image['width'], image['height'] = image['height'], image['width']


def whole(content: dict) -> str:
    return json.dumps(content)


ANNOTATION = ('annotations', 'id')
#: name -> (change, rules that it meets)
HARMLESS: dict[str, tuple[Change, set[str]]] = {
    'clean': (lambda c: None, set()),
    'category rows in reverse': (lambda c: c['categories'].reverse(), {'category-order'}),
    'category rows turned': (lambda c: c['categories'].append(c['categories'].pop(0)), {'category-order'}),
    'categories from 0': (
        lambda c: (
            each('categories', id=lambda i: {2: 0, 5: 1, 9: 2}[i])(c),
            each('annotations', category_id=lambda i: {2: 0, 5: 1, 9: 2}[i])(c),
        ),
        set(),
    ),
    'ids fall where names rise': (
        lambda c: (each('categories', id=lambda i: 100 - i)(c), each('annotations', category_id=lambda i: 100 - i)(c)),
        set(),
    ),
    'unused root row': (lambda c: c['categories'].insert(0, dict(id=0, name='animals')), {'other-categories'}),
    'image rows in reverse': (lambda c: c['images'].reverse(), set()),
    'annotation rows in reverse': (lambda c: c['annotations'].reverse(), set()),
    'images from 0': (
        lambda c: (each('images', id=lambda i: i - 3)(c), each('annotations', image_id=lambda i: i - 3)(c)),
        set(),
    ),
    'image ids text': (texts(('images', 'id'), ('annotations', 'image_id')), {'text-ids'}),
    'image ids text in images': (texts(('images', 'id')), {'text-ids'}),
    'image ids text in annotations': (texts(('annotations', 'image_id')), {'text-ids'}),
    'image ids with zeros': (each('images', id=lambda i: f'{i:06d}'), {'text-ids'}),
    'image ids 3.0': (each('annotations', image_id=float), {'text-ids'}),
    'image ids names': (
        together(each('images', id=lambda i: f'img_{i}'), each('annotations', image_id=lambda i: f'img_{i}')),
        set(),
    ),
    'category ids text': (texts(('categories', 'id'), ('annotations', 'category_id')), {'text-ids'}),
    'category ids text in annotations': (texts(('annotations', 'category_id')), {'text-ids'}),
    'category ids names': (
        together(each('categories', id=lambda i: f'c{i}'), each('annotations', category_id=lambda i: f'c{i}')),
        set(),
    ),
    'annotation ids from 0': (each('annotations', id=lambda i: i - 10), {'annotation-ids'}),
    'annotation ids negative': (each('annotations', id=lambda i: i - 12), {'annotation-ids'}),
    'annotation ids text': (texts(ANNOTATION), {'annotation-ids'}),
    'annotation ids uuid': (each('annotations', id=lambda i: f'7f{i}-x'), {'annotation-ids'}),
    'annotation ids missing': (each('annotations', id=...), {'annotation-ids'}),
    'annotation ids null': (each('annotations', id=None), {'annotation-ids'}),
    'annotation ids all 1': (each('annotations', id=1), {'annotation-ids'}),
    'annotation ids lists': (each('annotations', id=lambda i: [i]), {'annotation-ids'}),
    'annotation repeated': (lambda c: c['annotations'].append(dict(c['annotations'][1])), {'repeated'}),
    'iscrowd missing': (each('annotations', iscrowd=...), {'no-iscrowd'}),
    'iscrowd null': (each('annotations', iscrowd=None), {'no-iscrowd'}),
    'iscrowd false': (each('annotations', iscrowd=False), set()),
    'iscrowd text': (each('annotations', iscrowd='0'), set()),
    'area missing': (each('annotations', area=...), {'no-area'}),
    'area null': (each('annotations', area=None), {'no-area'}),
    'area 0': (each('annotations', area=0), {'no-area'}),
    'area -1': (each('annotations', area=-1), {'no-area'}),
    'area text': (each('annotations', area='large'), {'no-area'}),
    'area NaN': (each('annotations', area=float('nan')), {'no-area'}),
    'segmentation missing': (each('annotations', segmentation=...), {'no-segmentation'}),
    'segmentation null': (each('annotations', segmentation=None), {'no-segmentation'}),
    'segmentation empty': (each('annotations', segmentation=[]), {'no-segmentation'}),
    'sizes missing': (sizes(..., ...), {'no-size'}),
    'sizes null': (sizes(None, None), {'no-size'}),
    'sizes -1': (sizes(-1, -1), {'no-size'}),
    'sizes 0': (sizes(0, 0), {'no-size'}),
    'sizes text': (sizes(str, str), set()),
    'sizes 60.0': (sizes(float, float), set()),
    'sizes exchanged': (exchange, {'wrong-size'}),
    'byte order mark': (lambda c: b'\xef\xbb\xbf' + whole(c).encode(), {'byte-order-mark'}),
    'UTF-16': (lambda c: whole(c).encode('utf-16'), set()),
    'box outside the image': (
        add(
            'annotations', id=90, image_id=3, category_id=2, bbox=[90, 90, 5, 5], area=25, iscrowd=0, segmentation=[[1]]
        ),
        {'no-box-area'},
    ),
    'box without area': (
        add('annotations', id=90, image_id=3, category_id=2, bbox=[9, 9, 0, 5], area=5, iscrowd=0, segmentation=[[1]]),
        {'no-box-area'},
    ),
    'crowd': (
        add('annotations', id=90, image_id=3, category_id=2, bbox=[9, 9, 9, 5], area=45, iscrowd=1, segmentation=[[1]]),
        set(),
    ),
    'ignore': (
        add('annotations', id=90, image_id=3, category_id=2, bbox=[9, 9, 9, 5], area=45, ignore=1, segmentation=[[1]]),
        {'ignored'},
    ),
    'info missing': (lambda c: c.pop('info') and None, set()),
}


def changed(change: Change) -> Any:
    """The clean content with a change; a change that gives bytes or text gives the file."""
    content = clean()
    given = change(content)
    return given if isinstance(given, bytes | str) else content


@pytest.mark.parametrize('name', HARMLESS)
def test_harmless_quirks_leave_labels_boxes_and_ap(name: str, tmp_path) -> None:
    change, met = HARMLESS[name]
    path = write(tmp_path, changed(change))
    dataset = build(tmp_path)
    assert objects(dataset) == sorted(BOXES)
    assert set(read_coco_file(str(path)).findings.by_rule) | set(dataset.findings.by_rule) == met
    assert dataset.metainfo['classes'] == CLASSES

    test_set = build(tmp_path, test_mode=True)
    figures = [evaluate(path, test_set, perfect(test_set, BOXES), backend) for backend in BACKENDS]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6, nan_ok=True)
    assert figures[0]['coco/bbox_mAP'] == 1.0
    assert [figures[0][f'coco/{name}_precision'] for name in CLASSES] == [1.0, 1.0, 1.0]


def test_figures_of_imperfect_predictions_do_not_depend_on_quirks(tmp_path) -> None:
    """Every quirk at once that leaves areas alone, against the clean file, class by class."""
    some = [*BOXES[:2], ('b.png', 'owl', [4, 3, 28, 58]), ('b.png', 'dog', [20, 10, 12, 14])]
    quirks = [
        'category rows in reverse',
        'ids fall where names rise',
        'image ids text in images',
        'iscrowd missing',
        'annotation ids from 0',
        'sizes exchanged',
        'unused root row',
    ]
    figures = []
    for change in (lambda c: None, together(*(HARMLESS[name][0] for name in quirks))):
        path = write(tmp_path, changed(change))
        dataset = build(tmp_path, test_mode=True)
        figures += [evaluate(path, dataset, perfect(dataset, some), backend) for backend in BACKENDS]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], abs=1e-6, nan_ok=True)
    assert 0.2 < figures[0]['coco/bbox_mAP'] < 0.8
    # One of two cats, one of two dogs behind a false one, and an owl that is 2 pixels off on three sides.
    assert figures[0]['coco/cat_precision'] == pytest.approx(0.505, abs=1e-3)
    assert 0 < figures[0]['coco/owl_precision'] < 1


def test_one_log_line_a_rule_with_count_and_cases(tmp_path) -> None:
    messages: list[str] = []
    MMLogger.get_instance('rules').callHandlers = lambda record: messages.append(record.getMessage())
    write(tmp_path, changed(together(HARMLESS['iscrowd missing'][0], HARMLESS['sizes exchanged'][0])))
    build(tmp_path)
    crowd = [m for m in messages if 'iscrowd' in m]
    assert len(crowd) == 1
    assert '5 annotations without `iscrowd`: taken as single objects (0) (10, 11, 12, 13, 14)' in crowd[0]
    size = [m for m in messages if 'as large as stated' in m]
    assert len(size) == 1
    assert 'id 3 is 60x40 instead of 40x60' in size[0]


def test_exif_turns_count_for_the_size(tmp_path) -> None:
    """A picture that is stored lying and shown standing: its size is that of the turned picture."""
    write(tmp_path, changed(HARMLESS['sizes missing'][0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (64, 40)).save(tmp_path / 'b.png', exif=exif)
    dataset = build(tmp_path)
    assert [(i['width'], i['height']) for i in map(dataset.get_data_info, range(3))] == [(60, 40), (40, 64), (50, 50)]


def first(kind: str, **values: Any) -> Change:
    """As :func:`each`, in the first entry alone."""

    def change(content: dict) -> None:
        one = {kind: content[kind][:1]}
        each(kind, **values)(one)

    return change


#: name -> (change, words of the error)
FAULTS: dict[str, tuple[Change, list[str]]] = {
    'unknown category': (first('annotations', category_id=4), ['annotation 10', 'category_id 4']),
    'category id null': (first('annotations', category_id=None), ['annotation 10', 'category_id null']),
    'category id missing': (first('annotations', category_id=...), ['annotation 10', 'category_id null']),
    'category id list': (first('annotations', category_id=[2]), ['annotation 10', 'category_id [2]']),
    'category id true': (first('annotations', category_id=True), ['annotation 10', 'category_id true']),
    'unknown image': (first('annotations', image_id=44), ['annotation 10', 'image_id 44']),
    'image id object': (first('annotations', image_id={}), ['annotation 10', 'image_id {}']),
    'two images, one id': (each('images', id=3), ['2 images with the id of another', 'id 3 (b.png)']),
    'two images, one id as text': (
        lambda c: c['images'].append(dict(c['images'][0], id='3', file_name='deep/c.png')), ['id 3 (deep/c.png)']
    ),
    'two categories, one name': (each('categories', name='cat'), ["2 categories", "'cat' (id 5) in row 1"]),
    'two categories, one id': (each('categories', id=2), ['2 categories', "'dog' (id 2) in row 1"]),
    'category without name': (first('categories', name=...), ['categories without a valid', 'row 0']),
    'category name a number': (first('categories', name=7), ['categories without a valid', '"name": 7']),
    'category no object': (lambda c: c['categories'].append('cow'), ['row 3', '"cow"']),
    'image without file_name': (first('images', file_name=...), ['images without a valid', 'id 3', 'file_name null']),
    'image without id': (first('images', id=...), ['images without a valid', 'a.png']),
    'image no object': (lambda c: c['images'].append(None), ['entry 3', 'null']),
    'annotation no object': (lambda c: c['annotations'].append([1]), ['entry 5', '[1]']),
    'bbox missing': (first('annotations', bbox=...), ['annotation 10 of image id 3', 'null']),
    'bbox of three': (first('annotations', bbox=[1, 2, 3]), ['annotation 10 of image id 3: [1, 2, 3]']),
    'bbox NaN': (first('annotations', bbox=[1, 2, float('nan'), 3]), ['annotation 10 of image id 3', 'NaN']),
    'bbox infinite': (first('annotations', bbox=[1, 2, 1e999, 3]), ['annotation 10 of image id 3', 'Infinity']),
    'bbox huge': (first('annotations', bbox=[1, 2, 10**400, 3]), ['annotation 10 of image id 3']),
    'bbox text': (first('annotations', bbox=['1', '2', '3', '4']), ['annotation 10 of image id 3']),
    'bbox true': (first('annotations', bbox=[1, 2, 3, True]), ['annotation 10 of image id 3']),
    'bbox object': (first('annotations', bbox=dict(x=1)), ['annotation 10 of image id 3', '{"x": 1}']),
    'iscrowd 2': (first('annotations', iscrowd=2), ['`iscrowd` is neither 0 nor 1', 'annotation 10: 2']),
    'iscrowd list': (first('annotations', iscrowd=[]), ['`iscrowd` is neither 0 nor 1', 'annotation 10: []']),
    'images missing': (lambda c: c.pop('images') and None, ['`images` is missing']),
    'annotations missing': (lambda c: c.pop('annotations') and None, ['`annotations` is missing']),
    'categories missing': (lambda c: c.pop('categories') and None, ['`categories` is missing']),
    'annotations an object': (lambda c: c.update(annotations={}), ['`annotations` is a dict']),
    'a list': (lambda c: '[1, 2]', ['it holds a list']),
    'empty': (lambda c: '', ['JSON', 'line 1 column 1']),
    'truncated': (lambda c: json.dumps(c, indent=1)[:-40], ['JSON', 'line 155 column 12 of 1668 bytes', 'bytes']),
    'no UTF-8': (lambda c: whole(c).replace('cat', 'k\xe4tzchen').encode('latin-1'), ['JSON', 'byte', 'utf-8']),
    'nested': (lambda c: '[' * 100000, ['JSON', 'nested']),
    'size and picture missing': (
        lambda c: (c['images'][0].pop('width'), c['images'][0].update(file_name='z.png')), ['id 3 (z.png)', 'size']
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', FAULTS)
def test_faults_are_refused_in_words(name: str, tmp_path) -> None:
    change, words = FAULTS[name]
    path = write(tmp_path, changed(change))
    with pytest.raises(AnnotationError) as caught:
        build(tmp_path)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
    if name != 'size and picture missing':  # what needs pictures is the data set's to find
        with pytest.raises(AnnotationError) as caught:
            evaluate(path, None, [], 'pycocotools')
        assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


def test_all_faults_are_in_one_error_with_the_first_ten_cases(tmp_path) -> None:
    content = clean()
    for i in range(30):
        content['annotations'].append(dict(content['annotations'][0], id=100 + i, category_id=77))
    content['annotations'][1]['image_id'] = 1234
    content['annotations'][2]['bbox'] = None
    write(tmp_path, content)
    with pytest.raises(AnnotationError) as caught:
        build(tmp_path)
    message = str(caught.value)
    assert '30 annotations whose `category_id` no category has' in message
    assert 'annotation 109' in message
    assert 'annotation 110' not in message
    assert '1 annotations whose `image_id`' in message
    assert '1 annotations whose `bbox`' in message
    assert "on_fault='drop'" in message
    assert '--fix' in message


def test_faulty_entries_are_left_out_on_request_by_data_set_and_metric(tmp_path) -> None:
    content = clean()
    for i, fault in enumerate([dict(category_id=77), dict(image_id=77), dict(bbox=[1]), dict(iscrowd=5)]):
        content['annotations'].append(dict(content['annotations'][0], id=100 + i) | fault)
    content['images'].append(dict(content['images'][0], file_name='other.png'))
    content['images'].append(dict(id=50, file_name='missing.png', width=30, height=30))
    content['annotations'].append(dict(content['annotations'][0], id=200, image_id=50))
    path = write(tmp_path, content)
    dataset = build(tmp_path, test_mode=True, on_fault='drop')
    assert objects(dataset) == sorted(BOXES)
    assert len(dataset) == 3
    for backend in BACKENDS:
        assert evaluate(path, dataset, perfect(dataset, BOXES), backend, on_fault='drop')['coco/bbox_mAP'] == 1.0
    with pytest.raises(ValueError, match='`on_fault` is'):
        build(tmp_path, on_fault='ignore')


@pytest.mark.parametrize(
    ('classes', 'words'),
    [
        (('cat', 'dgo'), ["dgo (did you mean 'dog'?)"]),
        (('Cat', 'dog '), ["Cat (did you mean 'cat'?)", "dog  (did you mean 'dog'?)"]),
        ('cat', ["`classes=('cat',)`", 'comma']),
        (tuple('lion'), ['one letter', "`classes=('cat',)`"]),
        (('cat', 'cat'), ['names cat twice']),
        ((1, 2), ['`classes` is (1, 2)']),
        (None, ['no categories person', "it has 'cat', 'dog', 'owl'"]),
    ],
)
def test_classes_that_the_file_lacks(classes: Any, words: list[str], tmp_path) -> None:
    path = write(tmp_path, clean())
    with pytest.raises(AnnotationError) as caught:
        build(tmp_path, **({'metainfo': dict(classes=classes)} if classes else {'metainfo': None}))
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


def test_label_i_is_class_i_in_every_file_of_a_concatenation(tmp_path) -> None:
    from mmengine.dataset import ConcatDataset

    orders = [('owl', 'cat', 'dog'), ('dog', 'owl', 'cat')]
    for i, order in enumerate(orders):
        content = clean()
        content['categories'].sort(key=lambda c: order.index(c['name']))
        write(tmp_path, content, f'{i}.json')
    for classes in (CLASSES, CLASSES[::-1]):
        parts = [build(tmp_path, ann_file=f'{i}.json', metainfo=dict(classes=classes)) for i in range(2)]
        assert objects(parts[0]) == objects(parts[1]) == sorted(BOXES)
        both = ConcatDataset(parts)
        assert both.metainfo['classes'] == classes


def test_a_subset_of_the_classes_is_numbered_as_stated(tmp_path) -> None:
    path = write(tmp_path, clean())
    dataset = build(tmp_path, metainfo=dict(classes=('owl', 'cat')), test_mode=True)
    wanted = [box for box in BOXES if box[1] != 'dog']
    assert objects(dataset) == sorted(wanted)
    figures = evaluate(path, dataset, perfect(dataset, wanted), 'pycocotools')
    assert figures['coco/bbox_mAP'] == figures['coco/owl_precision'] == figures['coco/cat_precision'] == 1.0


@pytest.mark.parametrize('quirk', ['clean', 'category rows in reverse', 'image ids names', 'category ids names'])
def test_result_files_have_the_ids_of_the_annotation_file(quirk: str, tmp_path) -> None:
    path = write(tmp_path, changed(HARMLESS[quirk][0]))
    dataset = build(tmp_path, test_mode=True)
    evaluate(path, dataset, perfect(dataset, BOXES), 'pycocotools', outfile_prefix=str(tmp_path / 'out'))
    content = json.loads(path.read_text())
    names = {c['id']: c['name'] for c in content['categories']}
    files = {i['id']: i['file_name'] for i in content['images']}
    results = json.loads((tmp_path / 'out.bbox.json').read_text())
    assert sorted((files[r['image_id']], names[r['category_id']], r['bbox']) for r in results) == sorted(BOXES)


def test_predictions_for_other_images_are_refused(tmp_path) -> None:
    path = write(tmp_path, clean())
    dataset = build(tmp_path, test_mode=True)
    predictions = perfect(dataset, BOXES)
    predictions[0]['img_id'] = 999
    with pytest.raises(AnnotationError, match=r'image id 999, which .*ann\.json does not have'):
        evaluate(path, dataset, predictions, 'pycocotools')


def test_a_test_set_without_annotations_needs_none(tmp_path) -> None:
    content = clean()
    del content['annotations']
    path = write(tmp_path, content)
    dataset = build(tmp_path, test_mode=True)
    assert len(dataset) == 3
    assert objects(dataset) == []
    evaluate(
        path, dataset, perfect(dataset, BOXES), 'pycocotools', format_only=True, outfile_prefix=str(tmp_path / 'o')
    )
    assert len(json.loads((tmp_path / 'o.bbox.json').read_text())) == len(BOXES)
    with pytest.raises(AnnotationError, match='`annotations` is missing'):
        evaluate(path, dataset, [], 'pycocotools')


def test_a_file_is_read_once_for_data_set_and_metric(tmp_path, monkeypatch) -> None:
    path = write(tmp_path, clean())
    loads: list[str] = []
    original = json.load
    monkeypatch.setattr(json, 'load', lambda file: loads.append(getattr(file, 'name', 'a result')) or original(file))
    dataset = build(tmp_path, test_mode=True)
    build(tmp_path)
    evaluate(path, dataset, perfect(dataset, BOXES), 'pycocotools')
    assert loads == [str(path), 'a result']
    write(tmp_path, changed(HARMLESS['category rows in reverse'][0]))  # another file under the same name is read
    build(tmp_path)
    assert loads == [str(path), 'a result', str(path)]


def test_every_rule_is_met_by_a_case() -> None:
    """A rule without a case is either untested or dead."""
    met = set().union(*(rules for _, rules in HARMLESS.values()))
    harmless = {name for name, rule in RULES.items() if not rule.fault}
    assert harmless - met == {'tiny-box', 'passes-picture', 'picture-twice'}  # in test_coco.py, test_check.py, below


def test_two_images_of_one_picture_are_noted(tmp_path) -> None:
    content = clean()
    first = content['images'][0]
    content['images'].append(first | dict(id=90))
    findings = read_coco_file(str(write(tmp_path, content))).findings
    assert set(findings.by_rule) == {'picture-twice'}
    assert findings.line('picture-twice').startswith('1 images of the picture of another: kept apart')
    assert f'(id 90 ({first["file_name"]}))' in findings.line('picture-twice')
    assert len(build(tmp_path, test_mode=True)) == len(content['images'])


def mutations() -> st.SearchStrategy:
    """(list, entry, key, how) of one mutated field, or of a whole entry."""
    fields = {
        'images': ['id', 'file_name', 'width', 'height'],
        'annotations': ['id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'],
        'categories': ['id', 'name', 'supercategory'],
    }
    kind = st.sampled_from(list(fields))
    how = st.sampled_from(['drop', 'null', 'text', 'float', 'list', 'object', 'negative', 'duplicate', 'reverse'])
    return kind.flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 2), st.sampled_from(fields[k]), how))


def mutate(content: dict, kind: str, entry: int, key: str, how: str) -> None:
    row = content[kind][entry]
    value = row.get(key)
    if how == 'drop':
        row.pop(key, None)
    elif how == 'duplicate':
        content[kind].append(dict(row))
    elif how == 'reverse':
        content[kind].reverse()
    elif how == 'float':
        row[key] = float(value) if isinstance(value, int) else [value]
    elif how == 'negative':
        row[key] = -value if isinstance(value, int | float) and key not in ('id', 'iscrowd') else value
    else:
        row[key] = {'null': None, 'text': str(value), 'list': [value], 'object': {'value': value}}[how]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(mutations(), min_size=1, max_size=3), st.integers(0, 10**9))
def test_the_law(tmp_path_factory, changes, number) -> None:
    """A mutated file is read as the clean one, or refused in an error that names it and an id or a place in it."""
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp('law')
    content = clean()
    for kind, entry, key, how in changes:
        if entry < len(content[kind]):
            mutate(content, kind, entry, key, how)
    path = write(root, content)
    refusal = None
    try:
        dataset = build(root, test_mode=True)
        dataset.require_pictures()
        figures = [evaluate(path, dataset, perfect(dataset, BOXES), backend) for backend in BACKENDS]
    except AnnotationError as error:
        refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert any(mark in refusal for mark in ('id ', 'annotation ', 'row ', 'entry ', 'categories ')), refusal
        return
    assert objects(dataset) == sorted(BOXES)
    assert figures[0] == pytest.approx(figures[1], abs=1e-6, nan_ok=True)
    assert figures[0]['coco/bbox_mAP'] == 1.0


def test_the_table_in_the_docs_is_that_of_the_rules() -> None:
    rows = ['| rule | what happens | log line, or line of the error |', '|---|---|---|']
    for name, rule in RULES.items():
        what = 'accepted' if not rule.fault else 'refused, or left out on request' if rule.droppable else 'refused'
        rows.append(f'| {name} | {what} | N {rule.found}: {rule.then} |')
    table = '\n'.join(rows)
    assert table in (ROOT / 'docs' / 'data.md').read_text(), f'docs/data.md should have this table:\n{table}'
