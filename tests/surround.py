"""A clip with sound of any channels, which the package itself does not write."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_surround(path: Path, waveform_CS: np.ndarray, rate_hz: int, layout: str) -> None:
    """Float samples (C, S) beside black pictures of 10 per second, equally long; a .mov names the channels, a .mkv not."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("pcm_f32le", rate=rate_hz, layout=layout)
        step = rate_hz // 10
        for start in range(0, waveform_CS.shape[1], step):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
            part = np.ascontiguousarray(waveform_CS[:, start : start + step].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
            container.mux(audio.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))
