"""Every kind of picture becomes the pixels it shows, with both decoders, or an error that says what to do."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.apis import DetInferencer, inference_detector
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image

import dino_mm
from dino_mm.datasets.loading import UnreadableImageError, UnsupportedImageError, image_size
from tests.conftest import tiny_model_cfg

HEIGHT, WIDTH = 40, 58
both_decoders = pytest.mark.parametrize('backend', ['pillow', 'cv2'])


def smooth(dtype=np.uint8, channels: int = 3) -> np.ndarray:
    """A picture, (height, width, channels), that lossy formats keep, over the whole range of ``dtype``."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    waves = [np.sin(x / 11 + shift / 4) * np.cos(y / 9 - shift / 4) for shift in range(channels)]
    return np.round((np.stack(waves, 2) + 1) / 2 * np.iinfo(dtype).max).astype(dtype)


def noise(dtype=np.uint8, channels: int = 3) -> np.ndarray:
    shape = (HEIGHT, WIDTH, channels)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.reshape(HEIGHT, WIDTH, 1), 3, axis=2)


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG as its specification has it; ``values``: (height, width, channels), uint16 or uint8."""
    height, width = values.shape[:2]
    header = struct.pack('>IIBBBBB', width, height, 8 * values.itemsize, colour_type, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype(values.dtype.newbyteorder('>')).tobytes() for row in values)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def tiff(raw: bytes, bits: int, endian: str = '<', photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF as its specification has it."""
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: HEIGHT, 279: len(raw)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b''.join(struct.pack(endian + 'HHII', tag, 4, 1, value) for tag, value in tags.items())
    mark = b'II' if endian == '<' else b'MM'
    return mark + struct.pack(endian + 'HIH', 42, 8, len(tags)) + entries + bytes(4) + raw


def twelve_bits(values: np.ndarray) -> bytes:
    first, second = values[:, ::2], values[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).astype(np.uint8).tobytes()


def load(content: bytes, folder: Path, backend: str, **options) -> np.ndarray:
    """The picture as RGB."""
    (folder / 'picture').write_bytes(content)
    transform = TRANSFORMS.build(dict(type='LoadImageFromFile', _scope_='dino_mm', imdecode_backend=backend, **options))
    result = transform(dict(img_path=str(folder / 'picture')))
    assert result['img_shape'] == result['ori_shape'] == result['img'].shape[:2]
    return result['img'][..., ::-1]


PIXELS, DEEP = noise(), noise(np.uint16, 1)[..., 0]
ALPHA = Image.fromarray(noise(channels=4)[..., 3])
RGB, GREY = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
INDEXED = RGB.quantize(16)
COLOURS = np.array(INDEXED.getpalette()).reshape(-1, 3)[np.array(INDEXED)].astype(np.uint8)
INKS = Image.fromarray(noise(channels=4), 'CMYK')
INKED = np.round((255.0 - noise(channels=4)[..., :3]) * (255.0 - noise(channels=4)[..., 3:]) / 255)
WAVES = Image.fromarray(smooth())

#: Pillow mode of the source -> the source and the colours that it shows.
SOURCES = {
    '1': (Image.fromarray(PIXELS[..., 0] > 127), grey(np.where(PIXELS[..., 0] > 127, 255, 0))),
    'L': (GREY, grey(PIXELS[..., 0])),
    'LA': (Image.merge('LA', [GREY, ALPHA]), grey(PIXELS[..., 0])),
    'P': (INDEXED, COLOURS),
    'PA': (INDEXED.convert('PA'), COLOURS),
    'RGB': (RGB, PIXELS),
    'RGBA': (Image.merge('RGBA', [*RGB.split(), ALPHA]), PIXELS),
    'RGBX': (RGB.convert('RGBX'), PIXELS),
    'CMYK': (INKS, INKED),
    'YCbCr': (WAVES.convert('YCbCr'), smooth()),
    'LAB': (WAVES.convert('LAB'), smooth()),
    'I;16': (Image.fromarray(DEEP), grey(DEEP // 256)),
    'I;16B': (Image.frombytes('I;16B', (WIDTH, HEIGHT), DEEP.astype('>u2').tobytes()), grey(DEEP // 256)),
}
#: Format -> modes that it keeps; what a mode loses when it is made from or to RGB with 8 bits.
KEEPS = {
    'PNG': ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16', 'I;16B'],
    'TIFF': list(SOURCES),
    'WEBP': ['L', 'LA', 'P', 'RGB', 'RGBA'],
    'BMP': ['1', 'L', 'P', 'RGB', 'RGBA'],
    'GIF': ['1', 'L', 'P'],
}
TOLERANCE = {'CMYK': 1, 'YCbCr': 3, 'LAB': 9}


@both_decoders
@pytest.mark.parametrize(('form', 'mode'), [(form, mode) for form, modes in KEEPS.items() for mode in modes])
def test_every_mode_of_every_format(form: str, mode: str, backend: str, tmp_path) -> None:
    source, expected = SOURCES[mode]
    options = dict(lossless=True, exact=True) if form == 'WEBP' else {}
    content = encode(source, form, **options)
    if (form, mode) == ('TIFF', 'YCbCr') and int(PIL.__version__.split('.')[0]) < 13:  # it cannot read what it wrote
        with pytest.raises(UnreadableImageError, match='Cannot read the picture'):
            load(content, tmp_path, backend)
        return
    pixels = load(content, tmp_path, backend)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=TOLERANCE.get(mode, 0))


@both_decoders
@pytest.mark.parametrize('form', ['JPEG', 'WEBP'])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_lossy_formats(form: str, mode: str, backend: str, tmp_path) -> None:
    content = encode(WAVES.convert(mode), form, quality=95)
    expected = smooth() if mode != 'L' else grey(smooth() @ [0.299, 0.587, 0.114])
    np.testing.assert_allclose(load(content, tmp_path, backend), expected, rtol=0, atol=20 if form == 'WEBP' else 8)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('options', [{}, dict(progressive=True), dict(comment='a'), dict(exif=Image.Exif().tobytes())])
def test_decoders_agree_on_jpegs(mode: str, options: dict, tmp_path) -> None:
    content = encode(RGB.convert(mode), 'JPEG', **options)
    np.testing.assert_array_equal(load(content, tmp_path, 'cv2'), load(content, tmp_path, 'pillow'))


def deep_colour(form: str, channels: int) -> tuple[bytes, np.ndarray]:
    values = noise(np.uint16, channels)
    if form == 'PNG':
        return png(values, {2: 4, 3: 2, 4: 6}[channels]), values
    return cv2.imencode('.tiff', values[..., [2, 1, 0, 3][:channels]])[1].tobytes(), values


@both_decoders
@pytest.mark.parametrize(('form', 'channels'), [('PNG', 2), ('PNG', 3), ('PNG', 4), ('TIFF', 3), ('TIFF', 4)])
def test_sixteen_bits_of_each_channel(form: str, channels: int, backend: str, tmp_path) -> None:
    content, values = deep_colour(form, channels)
    expected = values[..., :3] if channels > 2 else grey(values[..., 0])
    np.testing.assert_array_equal(load(content, tmp_path, backend), expected // 256)


@both_decoders
@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (tiff(DEEP.astype('<u2').tobytes(), 16), DEEP // 256),
        (tiff(DEEP.astype('>u2').tobytes(), 16, '>'), DEEP // 256),
        (tiff(DEEP.astype('<u2').tobytes(), 16, photometric=0), (65535 - DEEP) // 256),
        (tiff(twelve_bits(DEEP % 4096), 12), DEEP % 4096 // 16),
        (encode(Image.fromarray(DEEP), 'TIFF', compression='tiff_lzw'), DEEP // 256),
        (b'P5 58 40 65535\n' + DEEP.astype('>u2').tobytes(), DEEP // 256),
        (encode(Image.fromarray(DEEP), 'JPEG2000', irreversible=False), DEEP // 256),
    ],
    ids=['little-endian', 'big-endian', 'white-is-zero', '12-bit', 'lzw', 'pgm', 'jpeg2000'],
)
def test_deep_grey(content: bytes, expected: np.ndarray, backend: str, tmp_path) -> None:
    np.testing.assert_array_equal(load(content, tmp_path, backend), grey(expected))


REFUSED = {
    'int32': encode(Image.fromarray(DEEP.astype(np.int32)), 'TIFF'),
    'uint32': tiff(DEEP.astype('<u4').tobytes(), 32),
    'signed': tiff(DEEP.astype('<i2').tobytes(), 16, sample_format=2),
    'float': encode(Image.fromarray(DEEP.astype(np.float32)), 'TIFF'),
    'float-0-1': tiff((DEEP / 65535).astype('<f4').tobytes(), 32, sample_format=3),
}


@both_decoders
@pytest.mark.parametrize('kind', REFUSED)
def test_pixels_without_a_range_are_refused(kind: str, backend: str, tmp_path) -> None:
    words = 'mode F, floating-point' if 'float' in kind else 'mode I, integers'
    with pytest.raises(UnsupportedImageError, match=rf'picture has Pillow {words}.* 8 or 16 bits.*Image\.fromarray'):
        load(REFUSED[kind], tmp_path, backend, ignore_empty=True)


@both_decoders
@pytest.mark.parametrize('offset', [0, 0x1200])
@pytest.mark.parametrize('kind', ['png', 'tiff', 'png-rgb', 'tiff-rgb', 'png-rgba'])
def test_shades_in_the_low_bits_only(kind: str, offset: int, backend: str, tmp_path) -> None:
    """Such a picture would become constant; one that is constant stays so."""
    form, _, colour = kind.partition('-')
    values = noise(np.uint16, max(len(colour), 1)) % 201 + np.uint16(offset)
    values[0] = offset  # the first row does not tell
    write = {
        'png': lambda v: png(v, {'': 0, 'rgb': 2, 'rgba': 6}[colour]),
        'tiff': lambda v: cv2.imencode('.tiff', v)[1].tobytes(),
    }[form]
    with pytest.raises(UnsupportedImageError, match=rf'picture has more than 8 bits.*from {offset} to {offset + 200}'):
        load(write(values), tmp_path, backend)
    constant = np.full_like(values, offset)
    assert (load(write(constant), tmp_path, backend) == offset // 256).all()


@both_decoders
@pytest.mark.parametrize('transparency', [3, bytes(range(0, 160, 10))])
def test_transparency_of_a_palette_is_dropped(transparency, backend: str, tmp_path) -> None:
    content = encode(INDEXED, 'PNG', transparency=transparency)
    np.testing.assert_array_equal(load(content, tmp_path, backend), COLOURS)


TURNED: dict[int, Callable] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@both_decoders
@pytest.mark.parametrize('orientation', TURNED)
@pytest.mark.parametrize('form', ['PNG', 'PNG late', 'PNG 16', 'JPEG', 'TIFF', 'TIFF 16', 'WEBP'])
def test_exif_orientation(form: str, orientation: int, backend: str, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    form, _, kind = form.partition(' ')
    pixels = smooth() if kind != '16' else grey(DEEP // 256)
    source = Image.fromarray(DEEP) if kind == '16' else WAVES
    options = dict(lossless=True) if form == 'WEBP' else dict(quality=95) if form == 'JPEG' else {}
    if kind == 'late':
        content = encode(source, form)
        content = content[:-12] + chunk(b'eXIf', exif.tobytes().removeprefix(b'Exif\0\0')) + content[-12:]
    else:
        content = encode(source, form, exif=exif, **options)
    expected = TURNED[orientation](pixels)
    found = load(content, tmp_path, backend)
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 if form == 'JPEG' else 0)
    assert image_size(content) == image_size(tmp_path / 'picture') == (found.shape[1], found.shape[0])


@both_decoders
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('damage', ['name', 'cut', 'byte order', 'text'])
def test_damaged_exif_data_turn_nothing(form: str, damage: str, backend: str, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    damaged = {
        'name': whole.replace(b'Exif', b'Exit'),
        'cut': whole[:9],
        'byte order': whole[:6] + b'XX' + whole[8:],
        'text': b'Exif\0\0garbage',
    }[damage]
    content = encode(WAVES, form, exif=damaged, **(dict(lossless=True) if form == 'WEBP' else dict(quality=95)))
    assert load(content, tmp_path, backend).shape[1::-1] == image_size(content) == (WIDTH, HEIGHT)


@both_decoders
@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'WEBP', 'MPO', 'GIF'])
def test_first_of_several_frames(form: str, backend: str, tmp_path) -> None:
    second = Image.fromarray(255 - smooth())
    options = dict(lossless=True) if form == 'WEBP' else {}
    content = encode(WAVES, form, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    tolerance = {'MPO': 20, 'GIF': 20}.get(form, 0)
    np.testing.assert_allclose(load(content, tmp_path, backend), smooth(), rtol=0, atol=tolerance)


@pytest.mark.parametrize('form', [*KEEPS, 'JPEG'])
def test_size_is_read_from_the_header_alone(form: str) -> None:
    content = encode(WAVES.resize((640, 480)), form)
    assert image_size(content) == (640, 480)
    if form != 'TIFF':  # its header may be at the end
        assert image_size(content[: max(1000, len(content) // 4)] + bytes(len(content))) == (640, 480)


@both_decoders
@pytest.mark.parametrize('damage', ['missing', 'empty', 'text', 'half', 'without its end'])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'WEBP', 'BMP'])
def test_damaged_files(form: str, damage: str, backend: str, tmp_path) -> None:
    content = encode(RGB, form)
    cut = dict(empty=b'', text=b'no picture', half=content[: len(content) // 2]).get(damage, content[:-40])
    path = tmp_path / 'shot.dat'
    if damage != 'missing':
        path.write_bytes(cut)
    config = dict(type='LoadImageFromFile', _scope_='dino_mm', imdecode_backend=backend)
    with pytest.raises(UnreadableImageError, match=r'Cannot read the picture .*shot\.dat: .*missing, damaged'):
        TRANSFORMS.build(config)(dict(img_path=str(path)))
    assert TRANSFORMS.build(config | dict(ignore_empty=True))(dict(img_path=str(path))) is None
    if damage in ('missing', 'empty', 'text'):
        with pytest.raises(UnreadableImageError, match=r'shot\.dat'):
            image_size(path)


def test_jpeg_that_ends_early_never_reaches_a_decoder_that_fills_it(tmp_path, monkeypatch) -> None:
    """OpenCV before 4.11 gives grey for the missing part."""
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: smooth())
    with pytest.raises(UnreadableImageError, match='truncated'):
        load(encode(RGB, 'JPEG')[:-200], tmp_path, 'cv2')


@both_decoders
def test_too_large_for_pillow(backend: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', WIDTH * HEIGHT // 3)
    with pytest.raises(UnsupportedImageError, match=r'picture is too large.*MAX_IMAGE_PIXELS'):
        load(encode(RGB, 'PNG'), tmp_path, backend)


@both_decoders
def test_other_arguments_mean_what_they_do_in_mmcv(backend: str, tmp_path) -> None:
    content = encode(SOURCES['RGBA'][0], 'PNG')
    floats = load(content, tmp_path, backend, to_float32=True)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, PIXELS)
    assert load(content, tmp_path, backend, color_type='unchanged').shape == (HEIGHT, WIDTH, 4)
    assert load(encode(GREY, 'PNG'), tmp_path, backend, color_type='grayscale').shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(load(content, tmp_path, backend, backend_args=dict(backend='local')), PIXELS)


def deep_file(folder: Path) -> tuple[str, np.ndarray]:
    """A 16-bit grey picture, and what it shows."""
    values = smooth(np.uint16, 1)[..., 0]
    Image.fromarray(values).save(folder / 'deep.png')
    return str(folder / 'deep.png'), grey(values // 256).astype(np.uint8)


@both_decoders
@pytest.mark.parametrize('config', ['dino-resnet/dino_r50_4scale_12ep.py', 'dino-demo/dino_digits.py'])
def test_shipped_pipelines_show_deep_pictures(config: str, backend: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv('IMAGE_BACKEND', backend)
    init_default_scope('mmdet')
    path, shown = deep_file(tmp_path)
    cfg = Config.fromfile(dino_mm.cfg(config))
    sample = dict(img_path=path, img_id=1, instances=[dict(bbox=[5, 5, 30, 30], bbox_label=1, ignore_flag=0)])
    pipelines = [cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline, cfg.tta_pipeline]
    for pipeline in pipelines:
        inputs = Compose(pipeline)(sample.copy())['inputs']
        for image in inputs if isinstance(inputs, list) else [inputs]:
            assert image.dtype == torch.uint8
            assert image.float().std() > 0.8 * shown.std()
            assert abs(image.float().mean() - shown.mean()) < 0.15 * shown.mean()


def test_mmdets_inferencers_show_deep_pictures(tmp_path) -> None:
    """Paths and arrays give the same detections: those of the high byte."""
    path, shown = deep_file(tmp_path)
    cfg = Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py'))
    cfg.model = tiny_model_cfg()
    inferencer = DetInferencer(cfg, device='cpu', show_progress=False)
    loader = inferencer.pipeline.transforms[0].from_file
    assert type(loader) is dino_mm.datasets.LoadImageFromFile
    assert loader.imdecode_backend == 'pillow'
    by_path, by_array = (inferencer(i, no_save_vis=True)['predictions'][0] for i in (path, shown))
    assert by_path == by_array
    assert by_path['scores']
    for source in (path, shown):
        found = inference_detector(inferencer.model, source).pred_instances
        np.testing.assert_allclose(found.scores, by_path['scores'], atol=1e-5)


@pytest.mark.parametrize('value', ['elsewhere', 'elsewhere/', None])
def test_data_root_with_and_without_a_slash(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('DATA_ROOT', raising=False)
    if value:
        monkeypatch.setenv('DATA_ROOT', value)
    cfg = Config.fromfile(dino_mm.cfg('_base_/datasets/coco_detection.py'))
    root = 'elsewhere/' if value else 'data/coco/'
    assert {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {root}
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == f'{root}annotations/instances_val2017.json'
