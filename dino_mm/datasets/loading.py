"""Reading pictures: one rule for every kind of pixel that a file can have, the same with both decoders."""

import errno
import io
import time
from pathlib import Path
from typing import BinaryIO

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile as MMCVLoadImageFromFile
from mmengine import fileio
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dino_mm.registry import TRANSFORMS

#: What cv2 reads as Pillow does. Pillow alone reads the rest: cv2 multiplies the colours of TIFFs by their alpha,
#: ignores the EXIF turn of WebP, and has other formulas for CMYK, YCbCr and LAB.
CV2_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP')
CV2_MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')

EIGHT_BIT_FORMATS = ('JPEG', 'MPO', 'WEBP')
"""What never has more bits, so that the search for them can be saved."""

#: Pillow's modes without a natural range, and what they hold.
REFUSED_MODES = {'I': 'integers of 32 bits or with signs', 'F': 'floating-point numbers'}

#: EXIF orientation -> how to turn the picture upright; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BITS_PER_SAMPLE, PHOTOMETRIC, IMAGE_WIDTH, IMAGE_LENGTH = 258, 262, 256, 257
"""Tags of TIFF files."""

JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of JPEGs before the description of the frame: baseline, extended, progressive."""

JPEG_METADATA = 0xE1
"""Marker of EXIF data and XMP."""

PNG_TAIL = 1 << 17
"""Bytes at the end of a PNG in which EXIF data are looked for; EXIF data have at most 64 KiB in most files."""

STRETCH = (
    'Convert it to 8 or 16 bits yourself, with the values that shall be black and white, for example: '
    "`Image.fromarray(((pixels - black) / (white - black) * 255).clip(0, 255).astype('uint8')).save('picture.png')`."
)


#: What storage says that is there, and does not answer just now; network file systems do.
TRANSIENT = {
    getattr(errno, name)
    for name in (
        *('EIO', 'ESTALE', 'EAGAIN', 'EBUSY', 'EREMOTEIO', 'ETIMEDOUT', 'ECONNRESET', 'ECONNABORTED', 'ECONNREFUSED'),
        *('ENETDOWN', 'ENETUNREACH', 'ENETRESET', 'EHOSTDOWN', 'EHOSTUNREACH', 'ENOTCONN', 'ESHUTDOWN'),
    )
    if hasattr(errno, name)
}
#: Seconds to wait before each new try to read a file.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)


class UnreadableImageError(OSError):
    """The file of a picture is missing, damaged, or of a format that Pillow does not know."""


class UnsupportedImageError(ValueError):
    """A picture is whole, but there is no rule that makes 8 bits of its pixels."""


@TRANSFORMS.register_module()
class LoadImageFromFile(MMCVLoadImageFromFile):
    """mmcv's transform of that name, with a rule for pictures that mmcv makes constant or reads in two ways.

    The result is BGR, uint8, shape (height, width, 3), turned upright by the EXIF data:

    - 16 bits become the high byte, and 12 bits the 8 highest; grey is copied to three channels.
    - Alpha is dropped. Of several frames, the first is taken.
    - 32-bit integers and floating-point numbers are refused, and so is a picture whose high bytes are all equal
      although its pixels are not.
    - A file on storage that does not answer is asked for again, five times in 15.5 s.

    ``color_type`` other than 'color', and decoders other than 'pillow' and 'cv2', are mmcv's affair, as before.

    Args:
        to_float32: Whether the result is float32.
        color_type: Flag of ``mmcv.imfrombytes``.
        imdecode_backend: Decoder, 'pillow' or 'cv2'; the latter is faster.
        ignore_empty: Whether the result of a missing or damaged file is None instead of an error. For training,
            ``on_unreadable`` of the data set is the better choice: it names, counts and stops.
        backend_args: File backend of ``mmengine.fileio``.

    Raises:
        UnreadableImageError: The file is missing or damaged.
        UnsupportedImageError: The picture's pixels are refused.
    """

    def __init__(
        self,
        *,
        to_float32: bool = False,
        color_type: str = 'color',
        imdecode_backend: str = 'cv2',
        ignore_empty: bool = False,
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(
            to_float32=to_float32,
            color_type=color_type,
            imdecode_backend=imdecode_backend,
            ignore_empty=ignore_empty,
            backend_args=backend_args,
        )

    def transform(self, results: dict) -> dict | None:
        """Add ``img``, ``img_shape`` and ``ori_shape`` of the file ``img_path``."""
        try:
            pixels = self._read(results['img_path'])
        except UnreadableImageError:
            if self.ignore_empty:
                return None
            raise
        results['img'] = pixels.astype(np.float32) if self.to_float32 else pixels
        results['img_shape'] = results['ori_shape'] = pixels.shape[:2]
        return results

    def _read(self, path: str) -> NDArray:
        content = read_file(path, self.backend_args)
        if self.color_type == 'color' and self.imdecode_backend in ('pillow', 'cv2'):
            return decode(content, self.imdecode_backend, path)
        return _decode_by_mmcv(content, self.color_type, self.imdecode_backend, path)


def read_file(path: str, backend_args: dict | None = None) -> bytes:
    """The content of a file; storage that does not answer is asked again, see ``WAITS``.

    Args:
        path: Path or address.
        backend_args: File backend of ``mmengine.fileio``.

    Raises:
        UnreadableImageError: The file is missing, or the storage fails for good.
    """
    waits = iter(WAITS)
    while True:
        try:
            return fileio.get(path, backend_args=backend_args)
        except Exception as error:  # each file backend has its own
            wait = next(waits, None) if _is_transient(error) else None
            if wait is None:
                raise _unreadable(path, error) from error
        time.sleep(wait)


def _is_transient(error: Exception) -> bool:
    reason = getattr(error, 'reason', error)  # urllib wraps what the socket says
    return isinstance(reason, TimeoutError | ConnectionError) or (
        isinstance(reason, OSError) and reason.errno in TRANSIENT
    )


def decode(content: bytes, backend: str, name: str) -> NDArray[np.uint8]:
    """Decode a picture to BGR, shape (height, width, 3), by the rule of :class:`LoadImageFromFile`.

    Args:
        content: The picture's file.
        backend: 'pillow' or 'cv2'.
        name: What messages call the picture.

    Raises:
        UnreadableImageError, UnsupportedImageError: As there.
    """
    if backend == 'cv2' and _is_plain_jpeg(content):
        return _decode_by_mmcv(content, 'color_ignore_orientation', 'cv2', name)  # it asks for no turn
    file = io.BytesIO(content)
    image = _open(file, name)
    if _is_deep_grey(image):
        return _decode_deep_grey(image, file, name)
    if image.mode in REFUSED_MODES:
        raise UnsupportedImageError(
            f'The picture {name} has Pillow mode {image.mode}, {REFUSED_MODES[image.mode]}, which have no natural '
            f'range from black to white. {STRETCH}'
        )
    if backend == 'cv2' and _cv2_agrees(image, file, content):
        pixels = _decode_by_mmcv(content, 'color_ignore_orientation', 'cv2', name)
    else:
        image = _load_upright(image, file, name)
        pixels = np.array(image if image.mode == 'RGB' else image.convert('RGB'))[:, :, ::-1]
    if image.format not in EIGHT_BIT_FORMATS and _is_constant(pixels):
        source = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if source is not None and source.dtype == np.uint16:
            _require_shades(np.atleast_3d(source)[..., :3], pixels, name)
    return pixels


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height of a picture, as :class:`LoadImageFromFile` turns it; only the header is read.

    Args:
        source: A local file, or its content.

    Raises:
        UnreadableImageError: The file is missing, or its header is damaged or of an unknown format.
        UnsupportedImageError: The picture has more pixels than Pillow opens.
    """
    if isinstance(source, bytes):
        return _upright_size(io.BytesIO(source), 'given as bytes')
    try:
        with Path(source).open('rb') as file:
            return _upright_size(file, str(source))
    except UnreadableImageError:
        raise
    except OSError as error:
        raise _unreadable(str(source), error) from error


def _upright_size(file: BinaryIO, name: str) -> tuple[int, int]:
    image = _open(file, name)
    tags = getattr(image, 'tag_v2', None)  # newer versions of Pillow turn the size of a TIFF, older do not
    width, height = (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH]) if tags else image.size
    turned = _find_turn(image, file) in [TURNS[orientation] for orientation in (5, 6, 7, 8)]
    return (height, width) if turned else (width, height)


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Read the header."""
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise UnsupportedImageError(
            f'The picture {name} is too large: {error} Cut it into tiles, or raise `PIL.Image.MAX_IMAGE_PIXELS`.'
        ) from error
    except Exception as error:  # damage shows itself in many ways
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UnreadableImageError:
    unknown = isinstance(error, UnidentifiedImageError)
    cause = 'Pillow does not know its format' if unknown else f'{type(error).__name__}: {error}'
    return UnreadableImageError(
        f'Cannot read the picture {name}: {cause}. The file is missing, damaged or of an unknown format: replace it, '
        'or convert it to PNG or JPEG.'
    )


def _decode_by_mmcv(content: bytes, flag: str, backend: str, name: str) -> NDArray:
    try:
        pixels = mmcv.imfrombytes(content, flag=flag, backend=backend)
    except Exception as error:
        raise _unreadable(name, error) from error
    if pixels is None:
        raise _unreadable(name, ValueError(f'{backend} finds no picture in it'))
    return pixels


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a whole JPEG of 8 bits, grey or coloured, without EXIF data or XMP.

    Most pictures that one trains on are. Pillow needs a twentieth of cv2's time to find out the same.
    """
    if content[:2] != b'\xff\xd8' or content[-2:] != b'\xff\xd9':
        return False
    position = 2
    while content[position : position + 1] == b'\xff':
        marker = content[position + 1]
        if marker in JPEG_FRAMES:
            precision, channels = content[position + 4 : position + 5], content[position + 9 : position + 10]
            return precision == b'\x08' and channels in (b'\x01', b'\x03')
        if not 0xC4 <= marker <= 0xFE or marker == JPEG_METADATA:
            return False
        position += 2 + int.from_bytes(content[position + 2 : position + 4], 'big')
    return False


def _cv2_agrees(image: Image.Image, file: BinaryIO, content: bytes) -> bool:
    """Whether cv2 gives the pixels that Pillow does."""
    if image.format not in CV2_FORMATS or image.mode not in CV2_MODES:
        return False
    # Some versions of cv2 fill a JPEG that ends early with grey. Pillow finds out whether this one does.
    if image.format in ('JPEG', 'MPO') and not content.endswith(b'\xff\xd9'):
        return False
    return _find_turn(image, file) is None


def _load_upright(image: Image.Image, file: BinaryIO, name: str) -> Image.Image:
    """Decode the pixels and turn them by the EXIF data."""
    try:
        image.load()
        turn = _find_turn(image, file)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise _unreadable(name, error) from error


def _find_turn(image: Image.Image, file: BinaryIO) -> Image.Transpose | None:
    """How the EXIF data ask to turn the picture; None: not at all."""
    if image.format == 'PNG' and 'exif' not in image.info and (exif := _exif_behind_pixels(file)):
        image.info['exif'] = exif
    try:
        # `image.getexif` decodes the pixels of a PNG.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF data that are damaged ask for nothing
        return None


def _exif_behind_pixels(file: BinaryIO) -> bytes:
    """The EXIF data of a PNG that follow its pixels, where Pillow's header has ended; empty if there are none."""
    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - PNG_TAIL))  # a walk over the chunks would read all of the file
    tail = file.read()
    file.seek(position)
    start = tail.rfind(b'eXIf')
    return tail[start + 4 : start + 4 + int.from_bytes(tail[start - 4 : start], 'big')] if start >= 4 else b''


def _is_deep_grey(image: Image.Image) -> bool:
    """Whether the picture is grey with 9 to 16 bits."""
    # Pillow stretches PGM of any depth to 16 bits, in mode I; older versions have that mode for PNG, too.
    return image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))


def _decode_deep_grey(image: Image.Image, file: BinaryIO, name: str) -> NDArray[np.uint8]:
    tags = getattr(image, 'tag_v2', {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    white_is_zero = tags.get(PHOTOMETRIC) == 0  # Pillow heeds that for 8 bits only
    values = np.asarray(_load_upright(image, file, name))
    high = (values >> (bits - 8)).astype(np.uint8)
    _require_shades(values, high, name)
    return np.repeat((~high if white_is_zero else high)[..., None], 3, axis=2)


def _require_shades(values: NDArray, pixels: NDArray[np.uint8], name: str) -> None:
    """Refuse ``values`` of more than 8 bits that differ although their highest 8 bits, ``pixels``, do not."""
    if _is_constant(pixels) and not _is_constant(values):
        raise UnsupportedImageError(
            f'The picture {name} has more than 8 bits, but its pixels, from {values.min()} to {values.max()}, differ '
            f'in the low bits only. The high bits, which would be taken, show nothing. {STRETCH}'
        )


def _is_constant(pixels: NDArray) -> bool:
    """Whether all pixels are equal; the first row decides for most pictures."""
    return bool((pixels[0] == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all())
