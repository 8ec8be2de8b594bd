"""Detect with a model of `dino-mm export`, by onnxruntime, numpy and Pillow alone.

python onnx_only.py MODEL.onnx PICTURE [--score-thr 0.3] [--out DRAWN.png]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError


class OnnxDetector:
    """A detector in an ONNX file, which says itself how pictures are prepared.

    Args:
        path: The file.

    Raises:
        ValueError: It is not one of ours, or its pictures are prepared in a way that only its config knows.
    """

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        entries = self.session.get_modelmeta().custom_metadata_map
        missing = [name for name in ('classes', 'mean', 'std', 'channels', 'resize') if name not in entries]
        if missing:
            raise ValueError(f'{path} has no {missing[0]!r} among its metadata: write it with `dino-mm export`.')
        self.meta = {name: json.loads(value) for name, value in entries.items()}
        if self.meta['resize'] is None:
            raise ValueError(f'{path} states no rule for sizes: its config does not resize by ResizeShortestEdge.')

    def detect(self, image):
        """Detections in a picture of Pillow.

        Returns:
            Boxes (n, 4), xyxy in pixels of the picture; scores (n,), descending; labels (n,).

        Raises:
            ValueError: The model was not made for pictures of this size.
        """
        image = ImageOps.exif_transpose(image)
        size = self._resized(*image.size)
        inputs = self._inputs(image, size)
        boxes, scores, labels = (output[0] for output in self.session.run(['boxes', 'scores', 'labels'], inputs))
        scale = np.array([new / old for new, old in zip(size, image.size, strict=True)], np.float32)
        boxes = np.clip(boxes / np.tile(scale, 2), 0, np.tile(np.array(image.size, np.float32), 2))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[kept], scores[kept], labels[kept]

    def _inputs(self, image, size):
        """The network's inputs from an upright picture that becomes ``size`` (width, height)."""
        width, height = size
        if image.mode.startswith('I;16'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # the high byte of 16 bits
        pixels = np.asarray(image.convert('RGB').resize(size, Image.Resampling.BILINEAR), np.float32)
        if self.meta['channels'] == 'BGR':
            pixels = pixels[:, :, ::-1]
        pixels = (pixels - np.array(self.meta['mean'], np.float32)) / np.array(self.meta['std'], np.float32)
        images = np.zeros((1, 3, *self._padded(height, width)), np.float32)
        images[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        return {'images': images, 'sizes': np.array([[height, width]], np.int64)}

    def _resized(self, width, height):
        """Width and height with the given shorter edge, unless the longer one would pass its limit."""
        shorter, longer = self.meta['resize']['shorter'], self.meta['resize']['longer']
        scale = shorter / min(width, height)
        width, height = (shorter, scale * height) if width <= height else (scale * width, shorter)
        if max(width, height) > longer:
            scale = longer / max(width, height)
            width, height = scale * width, scale * height
        return max(1, int(width + 0.5)), max(1, int(height + 0.5))

    def _padded(self, height, width):
        """Height and width of the network's input, with zeros at the bottom and right."""
        fixed = self.meta['height'], self.meta['width']
        if None in fixed:
            # Feature maps need a pixel for every query: only very small pictures are padded for that.
            while sum((height // stride) * (width // stride) for stride in self.meta['strides']) < self.meta['queries']:
                height, width = (height + 8, width) if height <= width else (height, width + 8)
            return tuple(-(-side // self.meta['divisor']) * self.meta['divisor'] for side in (height, width))
        if height > fixed[0] or width > fixed[1]:
            raise ValueError(
                f'The picture becomes {height} x {width} pixels (height x width), but the model is made for '
                f'{fixed[0]} x {fixed[1]}: export it with --dynamic size, or with a larger --size.'
            )
        return fixed


def draw(image, classes, boxes, scores, labels):
    """The picture with its boxes."""
    image = ImageOps.exif_transpose(image).convert('RGB')
    canvas = ImageDraw.Draw(image)
    for box, score, label in zip(boxes.tolist(), scores, labels, strict=True):
        canvas.rectangle(box, outline='red', width=2)
        canvas.text(box[:2], f'{classes[label]} {score:.2f}', fill='red')
    return image


def main():
    """Print the detections, and draw them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', help='ONNX file of `dino-mm export`')
    parser.add_argument('picture', help='picture in any format that Pillow reads')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score (%(default)s)')
    parser.add_argument('--out', help='where to draw the detections')
    args = parser.parse_args()
    for path in (args.model, args.picture):
        if not Path(path).is_file():
            sys.exit(f'error: there is no file {path}.')
    try:
        detector = OnnxDetector(args.model)
        image = Image.open(args.picture)
        boxes, scores, labels = detector.detect(image)
    except (ValueError, UnidentifiedImageError) as error:
        sys.exit(f'error: {error}')
    except Exception as error:  # those of onnxruntime have no common base
        sys.exit(f'error: onnxruntime cannot run {args.model}: {str(error).splitlines()[0]}')
    kept = scores >= args.score_thr
    classes = detector.meta['classes']
    for box, score, label in zip(boxes[kept].tolist(), scores[kept], labels[kept], strict=True):
        print(f'{classes[label]} {score:.3f} {" ".join(f"{side:.1f}" for side in box)}')
    if not kept.any():
        print(f'no object above {args.score_thr}; the best has {scores.max(initial=0):.3f}')
    if args.out:
        draw(image, classes, boxes[kept], scores[kept], labels[kept]).save(args.out)


if __name__ == '__main__':
    main()
