"""Latents to transformer tokens and back: video row-major over (frame, row, column), audio one token per latent frame.

Letters: B batch, C video channels, F H W latent frames/rows/columns, T video tokens; z audio channels, L audio latent
frames (= audio tokens), M latent mel bins. Source: spec section 2.2.
"""

from einops import rearrange
from torch import Tensor

from ..errors import ShapeError


def video_to_tokens(latent_BCFHW: Tensor) -> Tensor:
    """Video latent (B, C, F, H, W) to tokens (B, F*H*W, C), the column fastest; any dtype.

    Raises ShapeError for anything but five axes.
    """
    if latent_BCFHW.ndim != 5:
        raise ShapeError(
            f"a video latent has five axes (B, C, F, H, W), got shape {tuple(latent_BCFHW.shape)}"
        )
    return rearrange(latent_BCFHW, "B C F H W -> B (F H W) C")


def tokens_to_video(video_BTC: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Tokens (B, T, C) back to the video latent (B, C, F, H, W); frames, height, width count latent cells.

    Raises ShapeError if T is not frames * height * width: appended guide tokens have to be cut off before.
    """
    needed = frames * height * width
    if video_BTC.ndim != 3 or video_BTC.shape[1] != needed:
        raise ShapeError(
            f"tokens (B, {needed}, C) needed for {frames} x {height} x {width} latent cells, "
            f"got shape {tuple(video_BTC.shape)}"
        )
    return rearrange(video_BTC, "B (F H W) C -> B C F H W", F=frames, H=height, W=width)


def audio_to_tokens(latent_BzLM: Tensor) -> Tensor:
    """Audio latent (B, z, L, M) to tokens (B, L, z*M), feature index c*M + f; any dtype.

    Raises ShapeError for anything but four axes.
    """
    if latent_BzLM.ndim != 4:
        raise ShapeError(f"an audio latent has four axes (B, z, L, M), got shape {tuple(latent_BzLM.shape)}")
    return rearrange(latent_BzLM, "B z L M -> B L (z M)")


def tokens_to_audio(audio_BSD: Tensor, channels: int) -> Tensor:
    """Tokens (B, L, z*M) back to the audio latent (B, z, L, M); channels is z.

    Raises ShapeError if the feature width is no multiple of channels.
    """
    if audio_BSD.ndim != 3 or audio_BSD.shape[2] % channels:
        raise ShapeError(
            f"audio tokens (B, L, {channels} * mel bins) needed, got shape {tuple(audio_BSD.shape)}"
        )
    return rearrange(audio_BSD, "B L (z M) -> B z L M", z=channels)
