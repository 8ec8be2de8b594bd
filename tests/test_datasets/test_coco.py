"""The data set says what it finds wrong, and drops degenerate boxes with a count."""

import json
from pathlib import Path

import coco_cases
import pytest
from mmengine.logging import MMLogger
from PIL import Image

CLASSES = ('cat', 'dog')


def annotation(i: int, image: int, category: int = 1, bbox=(1, 2, 8, 9), **more) -> dict:
    return dict(id=i, image_id=image, category_id=category, bbox=list(bbox), area=bbox[2] * bbox[3], iscrowd=0) | more


def write(root: Path, annotations: list[dict], num_images: int = 4) -> Path:
    for i in range(num_images):
        Image.new('RGB', (32, 24), (i, 0, 0)).save(root / f'{i}.png')
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=32, height=24) for i in range(num_images)],
        annotations=annotations,
        categories=[dict(id=1, name='cat'), dict(id=5, name='dog')],
    )
    path = root / 'ann.json'
    path.write_text(json.dumps(content))
    return path


def build(root: Path, **more):
    loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    own = dict(metainfo=dict(classes=CLASSES), filter_cfg=dict(filter_empty_gt=True), pipeline=loading)
    return coco_cases.build(root, **own | more)


def test_degenerate_boxes_are_dropped_with_a_count(tmp_path, caplog) -> None:
    write(
        tmp_path,
        [
            annotation(1, 0),
            annotation(2, 0, 5, bbox=(3, 4, 0, 0)),
            annotation(3, 1, bbox=(40, 2, 5, 5)),  # outside the image
            annotation(4, 2, iscrowd=1),
            annotation(5, 2, bbox=(3, 4, 0.5, 9)),
        ],
    )
    messages: list[str] = []
    MMLogger.get_instance('degenerate').callHandlers = lambda record: messages.append(record.getMessage())
    dataset = build(tmp_path)
    # Image 1 has only a degenerate box, 2 only a crowd, 3 nothing.
    assert [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))] == [0]
    assert dataset[0]['gt_bboxes'].tensor.tolist() == [[1, 2, 9, 11]]
    outside = 'no positive width and height): left out of training and evaluation'
    assert any(f'{outside} (annotation 2 of image 0; annotation 3 of image 1)' in m for m in messages), messages
    assert any('1 boxes under one pixel: left out of training' in m for m in messages), messages
    assert any('3 images without boxes removed, 1 left' in m for m in messages), messages


def test_test_mode_keeps_every_image(tmp_path) -> None:
    write(tmp_path, [annotation(1, 0)])
    assert len(build(tmp_path, test_mode=True)) == 4


@pytest.mark.parametrize(
    ('annotations', 'more', 'error', 'words'),
    [
        ([], {}, ValueError, ['ann.json', 'none of 4 images']),
        (
            [annotation(7, 2, bbox=(1, 2, float('nan'), 3))],
            {},
            ValueError,
            ['ann.json', 'annotation 7 of image id 2', 'NaN'],
        ),
        (
            [annotation(1, 0)],
            dict(metainfo=dict(classes=('cat', 'horse'))),
            ValueError,
            ['no categories horse', "it has 'cat', 'dog'", 'metainfo'],
        ),
        (
            [annotation(1, 0)],
            dict(ann_file='missing.json'),
            FileNotFoundError,
            ['missing.json', 'dataset.ann_file', 'DATA_ROOT'],
        ),
    ],
)
def test_errors_name_file_and_remedy(tmp_path, annotations, more, error, words) -> None:
    write(tmp_path, annotations)
    with pytest.raises(error) as caught:
        build(tmp_path, **more)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'text'])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_unreadable_image_names_file_and_id(tmp_path, damage: str, backend: str) -> None:
    write(tmp_path, [annotation(1, 2)])
    image = tmp_path / '2.png'
    if damage == 'missing':
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:20] if damage == 'truncated' else b'no image')
    pipeline = [dict(type='LoadImageFromFile', imdecode_backend=backend)]
    dataset = build(tmp_path, pipeline=pipeline)
    with pytest.raises(
        RuntimeError, match=r'Cannot prepare image id 2 \(.*2\.png\).*remove the image from .*ann\.json'
    ):
        dataset[0]


@pytest.mark.parametrize('on_fault', ['error', 'drop'])
def test_missing_pictures_are_named_before_a_run_or_left_out(tmp_path, on_fault: str) -> None:
    write(tmp_path, [annotation(1, 0), annotation(2, 2)])
    (tmp_path / '2.png').unlink()
    dataset = build(tmp_path, on_fault=on_fault)
    if on_fault == 'drop':
        dataset.require_pictures()
        assert [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))] == [0]
        return
    assert len(dataset) == 2  # who only looks at the annotations may
    with pytest.raises(ValueError, match=r'1 images whose picture is missing.*id 2 \(.*/2\.png\)'):
        dataset.require_pictures()


@pytest.mark.parametrize(
    ('step', 'given'),
    [
        (dict(type='FilterAnnotations'), 'FilterAnnotations failed on an image of uint8, shape (24, 32, 3). Assert'),
        (dict(type='dino_mm.ResizeShortestEdge', scale='x'), 'ResizeShortestEdge failed on an image of uint8'),
        (
            dict(type='RandomChoice', transforms=[[dict(type='FilterAnnotations')]]),
            'FilterAnnotations failed on an image of uint8',
        ),
    ],
)
def test_a_failing_transform_is_named_and_no_damage_is_suspected(tmp_path, step: dict, given: str) -> None:
    write(tmp_path, [annotation(1, 2)])
    dataset = build(tmp_path, pipeline=[dict(type='LoadImageFromFile'), step])
    with pytest.raises(RuntimeError) as caught:
        dataset[0]
    assert f'Cannot prepare image id 2 ({tmp_path}/2.png): {given}' in str(caught.value)
    assert 'damaged' not in str(caught.value)


def test_boxes_that_pass_their_pictures_are_named(tmp_path, caplog) -> None:
    """Corners in place of sizes, as most such boxes are."""
    messages: list[str] = []
    MMLogger.get_instance('corners').callHandlers = lambda record: messages.append(record.getMessage())
    write(tmp_path, [annotation(1, 0), annotation(2, 1, bbox=(20, 10, 30, 20))])
    dataset = build(tmp_path)
    assert dataset.get_data_info(1)['instances'][0]['bbox'] == [20, 10, 50, 30]
    assert any(
        '1 boxes that pass their picture' in m and 'not corners (annotation 2 of image 1)' in m for m in messages
    )
