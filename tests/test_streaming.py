"""Streamed codecs against the whole ones: equal over lengths, windows and structures, and bounded in memory.

Tolerance 1e-5: other sizes choose other kernels, which sum in another order (float32).
"""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from test_audio_codec import AUDIO_VAES, CHANNELS, VOCODERS, WAVEFORM_TOLERANCE, assert_near, seeded
from tiny_models import VIDEO_VAES
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.model.codec import streaming
from lockstep.model.codec.audio_vae import AudioVAE, AudioVAEConfig
from lockstep.model.codec.mel import MelConfig
from lockstep.model.codec.streaming import decode_stream, encode_stream
from lockstep.model.codec.video_vae import VideoVAE, VideoVAEConfig
from lockstep.model.codec.vocoder import VocoderConfig, build_vocoder
from lockstep.model.codec.windows import decode_audio_stream, encode_audio_stream, vocode_stream
from lockstep.model.embedded.config import VIDEO_VAE
from lockstep.model.errors import ShapeError, UnsupportedModelError
from lockstep.model.layers import products
from lockstep.model.layers.causal_conv import CausalConv3d
from lockstep.model.residency import MemoryCount

SMALL_EMBEDDED = VIDEO_VAE | {"encoder_base_channels": 4, "decoder_base_channels": 4, "latent_channels": 4}
STRUCTURES = {
    **VIDEO_VAES,
    "2.3-mirrored": VIDEO_VAES["2.3"] | {"spatial_padding_mode": "reflect"},
    "causal": VIDEO_VAES["2.3"] | {"causal_decoder": True},
    "causal-residual": VIDEO_VAES["2.0"] | {"causal_decoder": True},
    "timed": VIDEO_VAES["2.0"] | {"timestep_conditioning": True},
    "embedded": SMALL_EMBEDDED,
}


def random_vae(name: str) -> VideoVAE:
    """Seeded weights, modulation tables included."""
    vae = VideoVAE(VideoVAEConfig.from_published(STRUCTURES[name])).eval()
    generator = torch.Generator().manual_seed(5)
    for weight in (p for p in vae.parameters() if p.ndim):
        torch.nn.init.normal_(weight, std=max(1, weight[0].numel()) ** -0.5, generator=generator)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight *= 0.2  # pixels of about +-1, as real ones are
    return vae


VAES = {name: random_vae(name) for name in STRUCTURES}
QUICK = settings(max_examples=40, deadline=None, derandomize=True)

vaes = some.sampled_from(sorted(VAES))
sizes = some.tuples(some.integers(1, 7), some.integers(2, 3), some.integers(2, 4))
windows = some.integers(8, 18).map(lambda power: 2**power)  # from one frame at a time to all at once


@QUICK
@given(vaes, sizes, windows)
def test_a_streamed_decode_equals_the_whole_one(name, size, window_bytes):
    vae, latent = VAES[name], torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    streamed = torch.cat(list(decode_stream(vae, latent, window_bytes)), dim=2)
    assert_near(streamed, vae.decode(latent), 5e-5)  # random weights: values up to 10, sums in another order


@QUICK
@given(vaes, sizes, windows, some.integers(8, 15).map(lambda power: 2**power))
def test_a_decode_in_bands_of_rows_equals_the_whole_one(name, size, window_bytes, band_bytes):
    vae, latent = VAES[name], torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    streamed = torch.cat(list(decode_stream(vae, latent, window_bytes, band_bytes=band_bytes)), dim=2)
    assert_near(streamed, vae.decode(latent), 5e-5)


@pytest.mark.parametrize("name", ["2.3", "timed"])
def test_a_processor_without_16_bit_products_decodes_such_weights_by_those_of_float32(name, monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)
    seen, kernel = [], torch.mkldnn_convolution

    def noted(x, weight, bias, *how):
        seen.append({x.dtype, weight.dtype, bias.dtype})
        return kernel(x, weight, bias, *how)

    monkeypatch.setattr(torch, "mkldnn_convolution", noted)
    vae, latent = random_vae(name).bfloat16(), torch.randn(1, 4, 3, 2, 3)
    made = torch.cat(list(decode_stream(vae, latent.bfloat16(), 2**12)), dim=2)
    assert made.dtype == torch.bfloat16
    assert len(seen) > 20
    assert all(dtypes == {torch.float32} for dtypes in seen)
    wanted = vae.float().decode(latent.bfloat16().float())
    # a rounding in each of some twenty layers, of which most add to what came before
    assert (made.float() - wanted).square().mean().sqrt() < 0.03 * wanted.square().mean().sqrt()


def test_bands_bound_what_a_convolution_sees_whatever_the_frame():
    def widest(rows: int) -> int:
        with _Convolved() as seen:
            list(decode_stream(VAES["2.3"], torch.randn(1, 4, 2, rows, 4), 1, band_bytes=2**15))
        return max(seen.bytes)

    assert widest(24) <= 1.2 * widest(8)
    assert widest(8) < 2**16


class _Convolved(TorchDispatchMode):
    """The sizes of all that goes into convolutions."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@QUICK
@given(vaes, sizes, windows)
def test_a_streamed_encode_equals_the_whole_one(name, size, window_bytes):
    vae, grid = VAES[name], VAES[name].config.compression
    f, h, w = size
    shape = (1, 3, (f - 1) * grid.time + 1, h * grid.space, w * grid.space)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert_near(encode_stream(vae, pixels, window_bytes), vae.encode(pixels), 1e-5)


@pytest.mark.parametrize("name", VAES)
def test_batches_stream_too(name):
    latent = torch.randn(2, 4, 3, 2, 2)
    streamed = torch.cat(list(decode_stream(VAES[name], latent, 2**10)), dim=2)
    assert_near(streamed, VAES[name].decode(latent), 1e-5)


def test_frames_leave_before_the_last_latents_are_read():
    latent = torch.randn(1, 4, 12, 2, 2)
    counts = [frames.shape[2] for frames in decode_stream(VAES["2.3"], latent, 1)]
    assert len(counts) > 20
    assert sum(counts) == 4 * 11 + 1


def test_kept_frames_do_not_grow_with_the_clip():
    def largest(latents: int) -> int:
        with _Watch() as watch:
            for _ in decode_stream(VAES["2.3"], torch.randn(1, 4, latents, 3, 3), 1):
                pass
        return watch.most

    assert largest(30) <= 1.05 * largest(10)


def test_two_frames_of_each_convolution_are_all_that_a_stream_keeps(monkeypatch):
    tails, honest = {}, streaming._Tail.push

    def push(self, x_BFHWC):
        honest(self, x_BFHWC)
        tails[id(self)] = 0 if self.held is None else self.held.nbytes

    monkeypatch.setattr(streaming._Tail, "push", push)
    latent = torch.randn(1, 4, 12, 4, 4)
    with MemoryCount() as count:
        pieces = decode_stream(VAES["2.3"], latent, 1)
        between = [count.alive - frames.nbytes for frames in pieces]
    convolutions = sum(isinstance(module, CausalConv3d) for module in VAES["2.3"].decoder.modules())
    assert len(tails) == convolutions
    # beside them the frames of the windows under way
    assert max(between) <= 1.5 * sum(tails.values())


class _Watch(TorchDispatchMode):
    """The most bytes of tensors alive at once, counted at each operation by what Python still holds."""

    def __init__(self):
        super().__init__()
        self.most, self._alive = 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._alive[id(tensor)] = tensor
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._alive.values()
        }
        self.most = max(self.most, sum(storages.values()))
        return made


def test_progress_counts_frames_and_can_stop_the_decode():
    ticks, latent = [], torch.randn(1, 4, 5, 2, 2)
    for _ in decode_stream(VAES["2.3"], latent, 2**10, lambda done, total: ticks.append((done, total))):
        pass
    assert ticks[-1] == (17, 17)
    assert ticks == sorted(ticks)  # layers in between repeat the count
    assert len(set(ticks)) > 3

    def stop(done: int, total: int) -> None:
        raise Exception("enough")

    with pytest.raises(Exception, match=r"^enough$"):
        list(decode_stream(VAES["2.3"], latent, tick=stop))


def test_what_cannot_be_streamed_is_said_before_the_first_frame():
    with pytest.raises(ShapeError, match="2 x 2 are needed"):
        next(decode_stream(VAES["2.0"], torch.randn(1, 4, 2, 1, 2)))
    with pytest.raises(UnsupportedModelError, match="no noise level"):
        next(decode_stream(VAES["2.3"], torch.randn(1, 4, 2, 2, 2), timestep=0.1))
    config = VideoVAEConfig.from_published(VIDEO_VAES["2.3"])
    mirrored = VideoVAE(replace(config, encoder_padding="reflect")).eval()
    space = config.compression.space
    for rows, columns in ((1, 2), (2, 1)):
        with pytest.raises(ShapeError, match="this encoder mirrors"):
            encode_stream(mirrored, torch.randn(1, 3, 9, rows * space, columns * space))
    with pytest.raises(ShapeError, match="got 8: use 5 or 9"):
        encode_stream(VAES["2.3"], torch.randn(1, 3, 8, 32, 32))


AUDIO = {
    name: seeded(AudioVAE(AudioVAEConfig.from_published(section))) for name, section in AUDIO_VAES.items()
}
VOCODER = {
    name: seeded(build_vocoder(VocoderConfig.from_published(section))) for name, section in VOCODERS.items()
}
FULL_AUDIO = AudioVAE(
    AudioVAEConfig(MelConfig(mel_bins=16), width=4, latent_channels=2, multipliers=(1, 2, 4), res_blocks=2)
).eval()


@QUICK
@given(some.sampled_from([*AUDIO.values(), FULL_AUDIO]), some.integers(1, 90), some.integers(1, 40))
def test_streamed_mels_equal_the_whole(vae, latents, window):
    latent = torch.randn(1, vae.config.latent_channels, latents, vae.config.latent_bins)
    streamed = torch.cat(list(decode_audio_stream(vae, latent, window)), dim=2)
    assert_near(streamed, vae.decode(latent), 5e-5)  # random weights: values up to 10, sums in another order


@QUICK
@given(some.sampled_from([*AUDIO.values(), FULL_AUDIO]), some.integers(1, 300), some.integers(1, 40))
def test_streamed_audio_latents_equal_the_whole(vae, frames, window):
    mel = torch.randn(1, vae.config.channels_in, frames, vae.config.mel.mel_bins)
    assert_near(encode_audio_stream(vae, mel, window), vae.encode(mel), 5e-5)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(some.sampled_from(sorted(VOCODER)), some.integers(1, 120), some.integers(1, 50))
def test_a_streamed_waveform_equals_the_whole_one(name, frames, window):
    vocoder = VOCODER[name]
    mel = torch.randn(1, CHANNELS[name.split("-")[1]], frames, 16)
    streamed = torch.cat(list(vocode_stream(vocoder, mel, window)), dim=2)
    # periodic activations of random weights magnify another order of sums
    assert_near(streamed.clamp(-1, 1), vocoder(mel), 1e-5 if name.startswith("leaky") else WAVEFORM_TOLERANCE)
