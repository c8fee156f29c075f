"""Decodes pictures in a process of its own, which :mod:`gcfast.cli.data.image_tree` starts as a script.

Image formats are many and their decoders trusting: whatever a picture makes of one, its memory and time are
limited by the system, and a crash ends this process only. It imports nothing of gcfast and starts at once.

Standard input has a line of JSON (``count`` of the pictures, ``size`` to bring them to or null, ``free``
bytes, the ``memory`` of this process and the ``seconds`` that a small picture may take), then for each
picture eight bytes that say how long it is, and the picture. The file whose descriptor is the argument
gets, in eight bytes, the index of the picture at work, then the pixels.
Standard output gets a line of JSON at the end: what was read, or the picture at which it ended, and why.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import warnings
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

# Of all that Pillow knows, some start programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Modes of at most eight bits a channel. Opacity is left out, as torchvision does.
_GREY = ("1", "L", "LA")
_COLOURED = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_SMALL, _GROWTH = 1 << 26, 100  # as check_growth has them
_PIXELS_A_SECOND = 10_000_000  # decoders do ten times as many


def main() -> None:
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, pixels = sys.stdin.buffer, int(sys.argv[1])
    task = json.loads(source.readline())
    _limit(resource.RLIMIT_AS, task["memory"])
    answer: dict[str, Any] = {"modes": ""}
    kept = stored = 0
    for index in range(task["count"]):
        length = source.read(8)
        if len(length) < 8:  # whoever sends them ended
            return
        _limit_seconds(task["seconds"])
        os.pwrite(pixels, struct.pack("<Q", index), 0)
        try:
            raw = _exactly(source, *struct.unpack("<Q", length))
            stored += len(raw)
            with Image.open(io.BytesIO(raw), formats=_FORMATS) as picture:
                grey = _is_grey(picture)
                size = (task["size"],) * 2 if task["size"] else picture.size
                if size != tuple(answer.setdefault("size", size)):
                    answer |= {"error": "size", "index": index, "other": size}
                    break
                channels = 1 if grey else 3
                kept += channels * size[0] * size[1]
                _check_growth(len(raw), channels * picture.width * picture.height)
                if task["size"] is None:
                    _check_growth(stored, kept)
                if 3 * size[0] * size[1] * task["count"] > task["free"]:
                    answer |= {"error": "memory", "index": index, "other": size}
                    break
                _limit_seconds(task["seconds"] + picture.width * picture.height // _PIXELS_A_SECOND)
                decoded = picture.convert("L" if grey else "RGB")
            if decoded.size != size:
                decoded = decoded.resize(size, Image.Resampling.BILINEAR)
            content = decoded.tobytes()
        except MemoryError:
            answer |= {"error": f"decoding it takes more than {task['memory'] >> 20} MiB", "index": index}
            break
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            text = "no picture of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
            answer |= {"error": text[:300] or type(error).__name__, "index": index}
            break
        answer["modes"] += "L" if grey else "C"
        try:
            if os.pwrite(pixels, content, 8 + kept - len(content)) < len(content):
                raise OSError("no space left on device")
        except OSError as error:
            answer |= {"error": "disk", "index": index, "other": str(error)}
            break
    print(json.dumps(answer))


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _limit_seconds(more: int) -> None:
    _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + more)


def _exactly(source: BinaryIO, length: int) -> bytes:
    raw = source.read(length)
    if len(raw) != length:
        raise EOFError
    return raw


def _is_grey(picture: Image.Image) -> bool:
    """Raises ValueError where a channel has more than eight bits: Pillow would cut them off or clip them."""
    mode, bits = picture.mode, 8
    if picture.format == "TIFF":
        bits = max(picture.tag_v2.get(258, (8,)))  # type: ignore[attr-defined]
    for tile in getattr(picture, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        words = [word for word in arguments if isinstance(word, str) and word != "BGR;16"]  # 5, 6 and 5 bits
        if any(word.split(";")[-1].startswith("16") for word in words):
            bits = 16
        if tile[0].startswith("ppm") and arguments[1] > 255:
            bits = 16
    if bits > 8 or mode not in _GREY + _COLOURED:
        raise ValueError(
            f"expected 8 bits a channel, grey or coloured; got {max(bits, 16 if mode[0] in 'IF' else 8)} bits"
            f" (Pillow's mode {mode}): convert it"
        )
    return mode in _GREY


def _check_growth(stored: int, promised: int) -> None:
    bound = _SMALL + _GROWTH * stored
    if promised > bound:
        raise ValueError(
            f"{stored:,} bytes promise to become {promised:,} of pixels, expected at most {bound:,}"
        )


if __name__ == "__main__":
    main()
