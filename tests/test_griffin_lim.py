"""The mel decoder that seeks phases: tones, silence, onsets, refusals, and what the shipped network adds."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from bench.judge import count_clicks, find_onsets

from lockstep.model.codec.attacks import Attacks
from lockstep.model.codec.griffin_lim import GriffinLim, GriffinLimConfig, without_spikes
from lockstep.model.codec.mel import LogMel, MelConfig, slaney_filterbank
from lockstep.model.embedded import WEIGHTS, config, world
from lockstep.model.embedded.pack import unpack
from lockstep.model.embedded.sound import synthesize
from lockstep.model.embedded.train_vocoder import new_vocoder, vocoder_loss
from lockstep.model.errors import ShapeError, UnsupportedModelError

RATE_HZ = 16000
SECTION = {"_class_name": "GriffinLim", "output_sampling_rate": RATE_HZ}


@pytest.fixture(scope="module", params=[1024, 512])
def vocoder(request) -> GriffinLim:
    return of_window(request.param)


def of_window(samples: int) -> GriffinLim:
    module = GriffinLim(GriffinLimConfig.from_published(SECTION | {"win_length": samples}))
    module.get_buffer("mel_basis").copy_(torch.from_numpy(slaney_filterbank(MelConfig())).T)
    return module


def log_mel(vocoder: GriffinLim) -> LogMel:
    return LogMel(MelConfig(window_samples=vocoder.config.window_samples))


def through(vocoder: GriffinLim, waveform_S: torch.Tensor) -> torch.Tensor:
    return vocoder(log_mel(vocoder)(waveform_S[None, None]))[0, 0, : len(waveform_S)]


def tone(hz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.4 * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * RATE_HZ)) / RATE_HZ)


@pytest.mark.parametrize("hz", [120.0, 437.0, 1760.0, 4100.0])
def test_a_tone_keeps_its_pitch_and_its_level(vocoder, hz):
    made = through(vocoder, tone(hz))[2000:-2000]
    spectrum = torch.fft.rfft(made * torch.hann_window(len(made))).abs()
    found = spectrum.argmax() * RATE_HZ / len(made)
    # mel bands are 46 Hz wide below 1 kHz, 7 % above: a tone cannot come back finer than half of that, and comes back as a
    # narrow band, which beats: its sum of magnitudes is kept, up to 5 dB of its power are lost
    assert abs(found - hz) <= max(25.0, 0.04 * hz)
    assert -5 < 20 * math.log10(made.square().mean().sqrt() / (0.4 / math.sqrt(2))) < 1


def test_silence_stays_silent(vocoder):
    assert through(vocoder, torch.zeros(RATE_HZ)).abs().max() < 1e-3  # -60 dBFS


def test_an_impact_keeps_its_time_and_does_not_click(vocoder):
    wave = torch.zeros(RATE_HZ)
    decay = torch.exp(-torch.arange(RATE_HZ // 2) / (0.07 * RATE_HZ))
    wave[RATE_HZ // 2 :] = tone(430, 0.5) * decay
    made = through(vocoder, wave).double().numpy()
    (onset,) = find_onsets(made, RATE_HZ)
    assert onset == pytest.approx(0.5, abs=0.025)  # windows are up to 64 ms long
    assert count_clicks(made, RATE_HZ) == 0


@pytest.mark.parametrize("at", [8000, 8037, 8091, 8130])  # moments of a hop
def test_an_impact_is_not_heard_before_it_comes(at, monkeypatch):
    vocoder = of_window(512)
    wave = torch.zeros(RATE_HZ)
    decay = torch.exp(-torch.arange(RATE_HZ - at) / (0.07 * RATE_HZ))
    wave[at:] = tone(430)[: RATE_HZ - at] * decay

    def early_db() -> float:
        """The level of 12 to 5 ms before the impact beside that of the 10 ms after it."""
        made = through(vocoder, wave)
        early, late = made[at - 200 : at - 80], made[at : at + 160]
        return 10 * math.log10(early.square().mean() / late.square().mean())

    level_db = early_db()
    assert level_db < -40
    monkeypatch.setattr(Attacks, "held_back", lambda self, waveform_NS: waveform_NS)
    assert level_db < early_db() - 10  # phases alone leave it 21 to 39 dB below


def test_a_sound_goes_on_until_an_impact():
    vocoder = of_window(512)
    noise = 0.02 * torch.randn(RATE_HZ, generator=torch.Generator().manual_seed(0))
    wave = noise.clone()
    wave[8037:] += 0.4 * torch.randn(RATE_HZ - 8037, generator=torch.Generator().manual_seed(1))
    made = through(vocoder, wave)
    level = made[4000:7000].square().mean().sqrt()
    for start in range(7600, 8000, 100):
        assert made[start : start + 100].square().mean().sqrt() > 0.4 * level


@pytest.mark.parametrize(("window", "hop"), [(512, 160), (1024, 160), (500, 125), (300, 90), (64, 7)])
def test_what_has_no_attack_is_not_held_back(window, hop):
    wave = tone(437) + 0.1 * tone(1760)
    hann = torch.hann_window(window)
    wave = wave[None, : len(wave) // hop * hop]
    spectrum = torch.stft(wave, 1024, hop, window, hann, return_complex=True)
    # smoothing weighs ones, whose sum may miss 1 by rounding
    assert torch.allclose(Attacks(spectrum.abs(), hann, hop, 1024).held_back(wave), wave, rtol=1e-6)


def test_loud_mels_stay_below_full_scale(vocoder):
    loud = 10 * tone(500) + 5 * tone(730)
    made = vocoder(log_mel(vocoder)(loud[None, None]))
    assert made.abs().max() == pytest.approx(0.66, abs=1e-4)


def test_a_sample_that_stands_alone_is_smoothed_and_all_else_stays():
    wave = torch.stack([tone(300), tone(700)])
    spiked = wave.clone()
    spiked[1, 8000] += 0.3
    assert torch.equal(without_spikes(wave, RATE_HZ), wave)
    assert count_clicks(spiked[1].double().numpy(), RATE_HZ) == 1
    mended = without_spikes(spiked, RATE_HZ)
    assert count_clicks(mended[1].double().numpy(), RATE_HZ, times=3) == 0
    assert torch.equal(mended[0], wave[0])
    changed = (mended[1] != spiked[1]).nonzero().flatten()
    assert 8000 - 10 <= changed.min() <= changed.max() <= 8000 + 10


def test_the_same_mel_gives_the_same_waveform(vocoder):
    assert torch.equal(through(vocoder, tone(300)), through(vocoder, tone(300)))


def test_every_mel_frame_gives_one_hop_of_samples_for_each_channel(vocoder):
    assert vocoder(torch.full((2, 3, 7, 64), -5.0)).shape == (2, 3, 7 * 160)
    assert vocoder(torch.full((1, 1, 1, 64), -5.0)).shape == (1, 1, 160)


def test_other_mels_and_options_are_refused_by_name(vocoder):
    with pytest.raises(ShapeError, match="frames, 64"):
        vocoder(torch.zeros(1, 1, 5, 80))
    with pytest.raises(UnsupportedModelError, match="unheard_of=1"):
        GriffinLimConfig.from_published(SECTION | {"unheard_of": 1})
    with pytest.raises(UnsupportedModelError, match=r"hop of 900 .* use 1 to 512"):
        GriffinLimConfig.from_published(SECTION | {"hop_length": 900})
    with pytest.raises(UnsupportedModelError, match=r"window of 2048 samples is longer"):
        GriffinLimConfig.from_published(SECTION | {"win_length": 2048})


@pytest.fixture(scope="module")
def shipped() -> GriffinLim:
    module = GriffinLim(GriffinLimConfig.from_published(config.VOCODER)).eval()
    module.load_state_dict(unpack(WEIGHTS)[0]["vocoder"])
    return module


def without_network(vocoder: GriffinLim) -> GriffinLim:
    plain = copy.deepcopy(vocoder)
    plain.unmixer = None
    return plain


def sounds(motion: str, count: int = 8) -> torch.Tensor:
    """(N, 1, S): two seconds of fresh scenes, held-out combinations among them."""
    rng = random.Random(f"vocoder/{motion}")
    drawn = [world.draw_scene(rng, True, motion=motion) for _ in range(count)]
    return torch.stack([synthesize(scene, 2 * RATE_HZ, 1.0, 1.0) for scene in drawn])


def test_a_network_that_is_new_changes_nothing():
    new = new_vocoder(LogMel(MelConfig(window_samples=512)), seed=0)
    mel = torch.randn(1, 64, 30) - 5
    assert torch.equal(new.unmix(mel, 3), without_network(new).unmix(mel, 3))


@torch.inference_mode()
@pytest.mark.parametrize("motion", ["bounces", "slides", "pulses", "orbits"])
def test_the_shipped_network_finds_where_in_its_mel_bands_a_sound_lies(shipped, motion):
    """Magnitudes nearer to the true ones, and a waveform whose own mels are nearer to those it was made from."""
    wave = sounds(motion)
    to_mel, errors = log_mel(shipped), []
    mel, true = to_mel(wave), to_mel.magnitudes(wave)
    for module in (shipped, without_network(shipped)):
        loss, _ = vocoder_loss(module, mel[:, 0].mT, true[:, 0].mT)
        again = to_mel(module(mel)[..., : wave.shape[2]])
        errors.append((float(loss), float((again - mel)[mel > -9].abs().mean())))
    (loss, off), (plain_loss, plain_off) = errors
    assert loss < 0.55 * plain_loss
    assert off < 0.65 * plain_off


@torch.inference_mode()
@pytest.mark.parametrize("hz", [150.0, 437.0, 990.0, 1760.0])
def test_a_tone_of_the_shipped_vocoder_keeps_its_pitch(shipped, hz):
    made = through(shipped, tone(hz, 2.0))[4000:28000]
    spectrum = torch.fft.rfft(made * torch.hann_window(len(made))).abs()
    found = spectrum.argmax() * RATE_HZ / len(made)
    assert abs(found - hz) <= max(5.0, 0.01 * hz)


@torch.inference_mode()
@pytest.mark.parametrize("motion", ["bounces", "slides"])
def test_attacks_of_the_shipped_vocoder_do_not_meet_in_one_sample(shipped, motion):
    wave = sounds(motion, 20)
    made = shipped(log_mel(shipped)(wave))[:, 0].double().numpy()
    # well below the eight times at which it counts as a click: AAC takes some away between the attacks
    assert sum(count_clicks(one, RATE_HZ, times=3) for one in made) == 0


@torch.inference_mode()
@pytest.mark.parametrize("motion", ["bounces", "slides"])
def test_the_shipped_vocoder_keeps_the_time_of_attacks(shipped, motion):
    waves = sounds(motion)
    made = shipped(log_mel(shipped)(waves))[:, 0].double().numpy()
    offsets = []
    for wave, again in zip(waves[:, 0].double().numpy(), made, strict=True):
        onsets = find_onsets(again, RATE_HZ)
        offsets += [min((o - onset for o in onsets), key=abs) for onset in find_onsets(wave, RATE_HZ)]
    # phases alone let one in ten begin 9 ms early or more
    assert float(np.quantile(np.abs(offsets), 0.9)) < 0.0065


@torch.inference_mode()
def test_silence_of_the_shipped_vocoder_stays_silent(shipped):
    assert through(shipped, torch.zeros(RATE_HZ)).abs().max() < 1e-3
