"""Moving pictures: MP4 and GIF."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Generator, Iterable, Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from .._files import replacing
from ..errors import ConfigError
from .images import enlarge

__all__ = ["check_video_path", "save_video"]

_SMALLEST_WIDTH = 256  # pixels
_SHORTEST_DELAY = 2  # hundredths of a second; browsers show GIFs with shorter ones slowly
_STOPPED = "the video's encoder stopped before the end; is the disk full?"


def check_video_path(path: str | os.PathLike[str]) -> None:
    """Finds out early whether :func:`save_video` can write this kind of file here.

    Raises:
        ConfigError: the name ends in neither .mp4 nor .gif, or the package that writes MP4 is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise ConfigError(f"{os.fspath(path)}: the name has to end in .mp4 or .gif.")
    if suffix == ".mp4":
        try:
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"{os.fspath(path)}: MP4 needs the package imageio-ffmpeg "
                              f"(pip install 'hflow_fast[video]'); GIF does not. ({error})") from error


def save_video(frames: Iterable[Tensor], path: str | os.PathLike[str], *, fps: float = 24) -> None:
    """Writes frames as H.264 in an MP4 file, or as a GIF that repeats for ever: whole, or not at all.

    Small frames are enlarged by whole pixels, towards a width of 256. An MP4 is encoded as the frames come and plays in
    browsers (yuv420p); a last row or column is doubled where a side is odd. A GIF has 256 colours per frame, and a
    delay of whole hundredths of a second, at least two; Pillow keeps all its frames in memory.

    Args:
        frames: (3, H, W) each, uint8, all of one size; at least one.
        path: ends in .mp4 or .gif.
        fps: frames per second.

    Raises:
        ConfigError: see :func:`check_video_path`.
        ValueError: no frames.
        OSError: the file cannot be written.
    """
    check_video_path(path)
    pictures = (enlarge(frame, _SMALLEST_WIDTH).permute(1, 2, 0).contiguous().cpu().numpy() for frame in frames)
    first = next(pictures, None)
    if first is None:
        raise ValueError("save_video: there are no frames.")
    write = _write_mp4 if Path(path).suffix.lower() == ".mp4" else _write_gif
    with replacing(path) as temporary:
        write(itertools.chain([first], pictures), temporary, fps)


def _write_mp4(pictures: Iterator[np.ndarray], path: Path, fps: float) -> None:
    import imageio_ffmpeg

    first = _even(next(pictures))
    height, width = first.shape[:2]
    # The temporary file's name does not say its format; an index at the front lets browsers start before the end.
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2, quality=8,
        output_params=["-f", "mp4", "-movflags", "+faststart"], ffmpeg_log_level="error")
    writer.send(None)
    count = 0
    try:
        for picture in itertools.chain([first], map(_even, pictures)):
            _send(writer, picture)
            count += 1
    finally:
        writer.close()
    if _frames_of_mp4(path) != count:  # the writer does not say that the encoder failed on closing the file
        raise OSError(_STOPPED)


def _send(writer: Generator[None, np.ndarray, None], picture: np.ndarray) -> None:
    try:
        writer.send(picture)
    except OSError as error:
        raise OSError(_STOPPED) from error


def _frames_of_mp4(path: Path) -> int:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        return 0


def _even(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) with the last row and column doubled where H or W is odd."""
    height, width = picture.shape[:2]
    return np.ascontiguousarray(np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def _write_gif(pictures: Iterator[np.ndarray], path: Path, fps: float) -> None:
    first = Image.fromarray(next(pictures))
    delay = 10 * max(_SHORTEST_DELAY, round(100 / fps))
    first.save(path, format="gif", save_all=True, append_images=map(Image.fromarray, pictures), duration=delay, loop=0)
