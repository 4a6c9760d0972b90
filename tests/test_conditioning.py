"""Where guides put their tokens, how strongly those are held, and what is refused; one forward pass with them."""

import pytest
import torch
from test_audio_codec import assert_near, seeded
from tiny_models import TRANSFORMERS

from lockstep.model.conditioning.layout import held, lay_out_audio, lay_out_video
from lockstep.model.denoiser import JointDenoiser, starting_state
from lockstep.model.errors import ShapeError, WorkflowError
from lockstep.model.latents.patchify import audio_to_tokens, video_to_tokens
from lockstep.model.shapes import (
    ClipShape,
    audio_positions,
    frame_positions,
    reference_positions,
    video_positions,
)
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer, StreamInput
from lockstep.model.values import Conditioning, Context, Guide

SHAPE = ClipShape(17, 64, 96, 24.0)  # 3 x 2 x 3 latents, 18 tokens
FRAME_TOKENS = 6


def latent(frames: int = 1) -> torch.Tensor:
    return torch.randn(1, 4, frames, 2, 3)


def test_a_clip_without_guides_is_free_everywhere():
    layout = lay_out_video(SHAPE, 4, [])
    assert torch.equal(layout.mask, torch.ones(1, 18, 1))
    assert torch.equal(layout.clean, torch.zeros(1, 18, 4))
    assert torch.equal(layout.positions, video_positions(SHAPE))
    assert (layout.masks, layout.own_tokens, layout.frozen) == ((1.0,), 18, False)


def test_a_guide_at_the_start_takes_the_first_latents_place():
    picture = latent()
    layout = lay_out_video(SHAPE, 4, [Guide(picture, 0, 1.0)])
    assert layout.clean.shape == (1, 18, 4)
    assert torch.equal(layout.clean[:, :FRAME_TOKENS], video_to_tokens(picture))
    assert layout.mask[0, :, 0].tolist() == [0.0] * FRAME_TOKENS + [1.0] * 12
    assert torch.equal(layout.positions, video_positions(SHAPE))


def test_a_guide_at_the_start_takes_only_what_a_given_video_leaves_free():
    video, mask, picture = torch.randn(1, 4, 3, 2, 3), torch.ones(1, 1, 3, 2, 3), latent()
    mask[:, :, 0, :, :2] = 0
    layout = lay_out_video(SHAPE, 4, [Guide(picture, 0, 0.75)], video, mask)
    first, shown = layout.clean[0, :FRAME_TOKENS], video_to_tokens(picture)[0]
    kept = video_to_tokens(mask)[0, :FRAME_TOKENS, 0] == 0
    assert kept.tolist() == [True, True, False] * 2
    assert torch.equal(first[kept], video_to_tokens(video)[0, :FRAME_TOKENS][kept])
    assert torch.equal(first[~kept], shown[~kept])
    assert layout.mask[0, :FRAME_TOKENS, 0].tolist() == [0.0, 0.0, 0.25] * 2


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5])
def test_a_guide_at_the_start_takes_no_token_that_a_given_video_holds_as_much(strength):
    video, picture = torch.randn(1, 4, 3, 2, 3), latent()
    layout = lay_out_video(SHAPE, 4, [Guide(picture, 0, strength)], video, torch.full((1, 1, 3, 2, 3), 0.5))
    assert torch.equal(layout.clean, video_to_tokens(video))
    assert layout.masks == (0.5,)


def test_of_an_appended_guide_only_what_is_held_is_appended():
    picture, mask = latent(), torch.ones(1, 1, 1, 2, 3)
    mask[..., 0] = 0.5
    layout = lay_out_video(
        SHAPE, 4, [Guide(picture, 8, 1.0, mask), Guide(latent(), None, 0.5, attention=0.5)]
    )
    held_ = torch.tensor([True, False, False] * 2)
    assert torch.equal(layout.clean[:, 18:20], video_to_tokens(picture)[:, held_])
    assert torch.equal(layout.positions[:, :, 18:20], frame_positions(SHAPE, 8)[:, :, held_])
    assert layout.mask[0, 18:, 0].tolist() == [0.5] * 2 + [0.5] * FRAME_TOKENS
    assert layout.groups is not None
    assert layout.groups.tokens == (18, 2, FRAME_TOKENS)


@pytest.mark.parametrize(
    "guide",
    [
        Guide(latent(), 8, 0.0),
        Guide(latent(), None, 1.0, attention=0.0),
        Guide(latent(), 8, 1.0, torch.ones(1, 1, 1, 2, 3)),
    ],
    ids=["no strength", "no attention", "all free"],
)
def test_a_guide_of_which_nothing_counts_is_left_out(guide):
    layout = lay_out_video(SHAPE, 4, [guide])
    assert (layout.clean.shape[1], layout.masks, layout.groups) == (18, (1.0,), None)


def test_a_later_guide_is_appended_at_its_frame():
    picture = latent()
    layout = lay_out_video(SHAPE, 4, [Guide(picture, 8, 0.75)])
    assert layout.own_tokens == 18
    assert torch.equal(layout.clean[:, 18:], video_to_tokens(picture))
    assert layout.mask[0, :, 0].tolist() == [1.0] * 18 + [0.25] * FRAME_TOKENS
    assert torch.equal(layout.positions[:, :, 18:], frame_positions(SHAPE, 8))


def test_a_reference_is_appended_where_its_own_pictures_would_stand():
    picture = latent()
    layout = lay_out_video(SHAPE, 4, [Guide(picture, None, 1.0)])
    assert layout.own_tokens == 18
    assert torch.equal(layout.clean[:, 18:], video_to_tokens(picture))
    assert torch.equal(layout.positions[:, :, 18:], reference_positions(SHAPE, 1, 2, 3))
    assert layout.mask[0, 18:, 0].tolist() == [0.0] * FRAME_TOKENS


def test_a_reference_may_be_smaller_by_a_whole_number_and_stand_alone():
    shape = ClipShape(9, 128, 192, 24.0)
    layout = lay_out_video(shape, 4, [Guide(latent(2), None, 1.0)])
    assert torch.equal(layout.positions[:, :, -12:], reference_positions(shape, 2, 2, 3, downscale=2))
    with pytest.raises(ShapeError, match="guide has latents"):
        lay_out_video(shape, 4, [Guide(torch.randn(1, 4, 1, 3, 3), None, 1.0)])
    with pytest.raises(ShapeError, match=r"needs \(1, 4, 1, 4, 6\)"):  # too large
        lay_out_video(shape, 4, [Guide(torch.randn(1, 4, 1, 9, 13), None, 1.0)])
    with pytest.raises(WorkflowError, match="two reference pictures, a clip takes one"):
        lay_out_video(SHAPE, 4, [Guide(latent(), None, 1.0), Guide(latent(), None, 1.0)])


def test_several_guides_keep_their_order_strength_and_length():
    guides = [Guide(latent(), 16, 0.5), Guide(latent(2), 0, 0.9), Guide(latent(2), 4, 1.0)]
    layout = lay_out_video(SHAPE, 4, guides)
    assert layout.clean.shape[1] == layout.mask.shape[1] == layout.positions.shape[2] == 18 + 6 + 12
    wanted = torch.cat([video_to_tokens(guides[1].latent), torch.zeros(1, 6, 4)], dim=1)
    assert torch.equal(layout.clean[:, :18], wanted)
    assert torch.equal(layout.clean[:, 18:24], video_to_tokens(guides[0].latent))
    assert torch.equal(layout.clean[:, 24:], video_to_tokens(guides[2].latent))
    assert torch.equal(layout.positions[:, :, 24:], frame_positions(SHAPE, 4, 2))


def test_what_a_sound_sees_of_pictures_is_what_is_given_of_them_whole_and_still():
    first, later, object_ = latent(), latent(), latent()
    guides = [Guide(first, 0, 1.0), Guide(later, 9, 0.5), Guide(object_, None, 1.0, attention=0.5)]
    layout = lay_out_video(SHAPE, 4, guides)
    seen = held(layout)
    assert torch.equal(seen.clean, torch.cat([video_to_tokens(x) for x in (first, later, object_)], 1))
    assert (seen.masks, seen.frozen, seen.own_tokens, seen.groups) == ((0.0,), True, 0, None)
    assert not seen.mask.any()
    assert torch.equal(seen.positions[:, :, :6], video_positions(SHAPE)[:, :, :6])
    assert torch.equal(seen.positions[:, :, 6:12], frame_positions(SHAPE, 9))
    # alone, at its own place, a reference would be the clip's first picture
    moved = reference_positions(SHAPE, 1, 2, 3) - torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert torch.equal(seen.positions[:, :, 12:], moved)
    masked = torch.zeros(1, 1, 1, 2, 3)
    masked[..., 1:] = 1
    assert held(lay_out_video(SHAPE, 4, [Guide(first, 0, 1.0, mask=masked)])).clean.shape[1] == 2
    assert held(lay_out_video(SHAPE, 4, [])).clean.shape[1] == 0


def test_levels_say_of_every_token_what_its_mask_is():
    layout = lay_out_video(SHAPE, 4, [Guide(latent(), 0, 1.0), Guide(latent(), 8, 0.8)])
    assert len(layout.masks) == 3
    assert torch.equal(torch.tensor(layout.masks)[layout.level_of_token], layout.mask[..., 0])


@pytest.mark.parametrize(
    "guides", [[], [Guide(torch.zeros(1, 4, 1, 2, 3), 0, 1.0), Guide(torch.zeros(1, 4, 1, 2, 3), 8, 1.0)]]
)
def test_the_clips_first_latent_frame_is_marked_and_no_guide(guides):
    layout = lay_out_video(SHAPE, 4, guides)
    assert layout.marked.shape == layout.mask.shape[:2]
    assert layout.marked[0].nonzero().flatten().tolist() == list(range(FRAME_TOKENS))


def test_audio_is_laid_out_without_marks():
    layout = lay_out_audio(SHAPE, 2, 8)
    assert layout.clean.shape == (1, SHAPE.audio_latents, 16)
    assert torch.equal(layout.positions, audio_positions(SHAPE.audio_latents, SHAPE.audio_rate))
    assert not layout.marked.any()
    assert not layout.frozen


def test_given_streams_are_frozen():
    video, audio = latent(3), torch.randn(1, 2, SHAPE.audio_latents, 8)
    video_layout, audio_layout = lay_out_video(SHAPE, 4, [], video), lay_out_audio(SHAPE, 2, 8, audio)
    assert video_layout.frozen
    assert audio_layout.frozen
    assert torch.equal(video_layout.clean, video_to_tokens(video))
    assert torch.equal(audio_layout.clean, audio_to_tokens(audio))


def test_a_masked_video_is_free_only_where_its_mask_says():
    mask = torch.zeros(1, 1, 3, 2, 3)
    mask[:, :, 1:] = 1
    mask[:, :, 0, 0, 0] = 0.5
    video = latent(3)
    layout = lay_out_video(SHAPE, 4, [], video, mask)
    assert torch.equal(layout.mask, video_to_tokens(mask))
    assert torch.equal(layout.clean, video_to_tokens(video))
    assert layout.masks == (0.0, 0.5, 1.0)
    assert not layout.frozen


def test_a_guide_takes_its_place_in_a_masked_video():
    video, guide = latent(3), Guide(latent(), 0, 1.0)
    layout = lay_out_video(SHAPE, 4, [guide], video, torch.ones(1, 1, 3, 2, 3))
    assert torch.equal(layout.clean[:, :FRAME_TOKENS], video_to_tokens(guide.latent))
    assert torch.equal(layout.clean[:, FRAME_TOKENS:], video_to_tokens(video[:, :, 1:]))


def test_a_masked_sound_is_free_only_where_its_mask_says():
    mask = torch.zeros(1, 1, SHAPE.audio_latents, 1)
    mask[:, :, 2:] = 1
    layout = lay_out_audio(SHAPE, 2, 8, torch.randn(1, 2, SHAPE.audio_latents, 8), mask)
    assert layout.mask[0, :, 0].tolist() == [0, 0] + [1] * (SHAPE.audio_latents - 2)


@pytest.mark.parametrize("frame", [0, 8])
def test_a_guide_holds_only_what_its_mask_leaves(frame):
    mask = torch.zeros(1, 1, 1, 2, 3)
    mask[..., 0] = 1
    layout = lay_out_video(SHAPE, 4, [Guide(latent(), frame, 0.8, mask)])
    place = slice(0, FRAME_TOKENS) if frame == 0 else slice(layout.own_tokens, None)
    wanted = video_to_tokens(1 - 0.8 * (1 - mask))
    wanted = (
        wanted if frame == 0 else wanted[:, wanted[0, :, 0] < 1]
    )  # what is free of an appended one is left out
    assert torch.allclose(layout.mask[:, place], wanted)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 2, 2, 3), torch.full((1, 1, 3, 2, 3), 1.5)])
def test_a_mask_of_another_size_or_range_is_refused(mask):
    with pytest.raises(ShapeError, match="video mask"):
        lay_out_video(SHAPE, 4, [], latent(3), mask)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(WorkflowError, match=f"strength {strength} must lie between 0 and 1"):
        lay_out_video(SHAPE, 4, [Guide(latent(), 0, strength)])


def test_two_guides_in_one_place_are_refused():
    with pytest.raises(WorkflowError, match="two pictures at frame 8: give one of them another frame"):
        lay_out_video(SHAPE, 4, [Guide(latent(), 8, 1.0), Guide(latent(), 8, 0.5)])


@pytest.mark.parametrize("frame", [-8, 17])
def test_a_guide_outside_the_clip_is_refused(frame):
    with pytest.raises(ShapeError, match="lies outside the clip: use 0 to 16"):
        lay_out_video(SHAPE, 4, [Guide(latent(), frame, 1.0)])


@pytest.mark.parametrize("frame", [0, 8])
def test_a_guide_longer_than_the_clip_is_refused(frame):
    with pytest.raises(WorkflowError, match="a guide of 4 latent frames does not fit 3"):
        lay_out_video(SHAPE, 4, [Guide(latent(4), frame, 1.0)])


@pytest.mark.parametrize("frame", [0, 8])
def test_a_guide_of_another_size_is_refused_with_both(frame):
    with pytest.raises(ShapeError, match=r"\(1, 4, 1, 2, 2\), this clip needs \(1, 4, 1, 2, 3\)"):
        lay_out_video(SHAPE, 4, [Guide(torch.zeros(1, 4, 1, 2, 2), frame, 1.0)])


def test_given_streams_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="given video"):
        lay_out_video(SHAPE, 4, [], latent(2))
    with pytest.raises(ShapeError, match="given audio"):
        lay_out_audio(SHAPE, 2, 8, torch.zeros(1, 2, SHAPE.audio_latents + 1, 8))


def test_guides_on_a_given_video_are_refused():
    with pytest.raises(WorkflowError, match="the video is kept whole, so no picture can be held"):
        lay_out_video(SHAPE, 4, [Guide(latent(), 0, 1.0)], latent(3))


# --- noise and the denoiser read a layout ----------------------------------------------------------------------------------


def test_a_weak_guide_goes_on_from_itself_where_a_run_begins_with_latents():
    """Then as much of it is there as its noise level says: (1 - 0.5 * 0.4) of the picture, 0.5 * 0.4 of the noise."""
    picture = latent()
    video, audio = lay_out_video(SHAPE, 4, [Guide(picture, 8, 0.5)]), lay_out_audio(SHAPE, 2, 8)
    begun = latent(3), torch.randn(1, 2, SHAPE.audio_latents, 8)
    tokens = [
        starting_state(SHAPE, video, audio, 2, 7, scale, torch.device("cpu"), begun).video.tokens_BTC[:, 18:]
        for scale in (0.4, 1.0)
    ]
    noise = (tokens[1] - 0.5 * video_to_tokens(picture)) / 0.5
    assert torch.allclose(tokens[0], 0.8 * video_to_tokens(picture) + 0.2 * noise, atol=1e-6)


def start(guides=(), noise_scale: float = 1.0):
    video, audio = lay_out_video(SHAPE, 4, guides), lay_out_audio(SHAPE, 2, 8)
    return starting_state(SHAPE, video, audio, 2, 7, noise_scale, torch.device("cpu"))


def test_a_run_starts_from_the_clean_tokens_and_the_seeds_noise_by_mask():
    guides = [Guide(latent(), 0, 1.0), Guide(latent(), 8, 0.75)]
    free, guided = start(), start(guides)
    assert torch.equal(guided.video.tokens_BTC[:, :FRAME_TOKENS], video_to_tokens(guides[0].latent))
    # a guide changes nothing of the noise before it
    assert torch.equal(guided.video.tokens_BTC[:, FRAME_TOKENS:18], free.video.tokens_BTC[:, FRAME_TOKENS:18])
    assert torch.equal(guided.audio.tokens_BTC, free.audio.tokens_BTC)
    noise = (guided.video.tokens_BTC[:, 18:] - 0.75 * video_to_tokens(guides[1].latent)) / 0.25
    assert 0.5 < noise.std().item() < 1.5  # 24 values of a standard normal


def test_a_run_may_start_below_full_noise():
    whole, half = start(), start(noise_scale=0.5)
    assert_near(half.video.tokens_BTC, whole.video.tokens_BTC / 2, 1e-6)


@pytest.fixture(scope="module")
def transformer() -> AVTransformer:
    return seeded(AVTransformer(TransformerConfig.from_published(TRANSFORMERS["2.5"])))


def make_denoiser(transformer: AVTransformer, guides=(), given_audio=None, audio_mask=None) -> JointDenoiser:
    contexts = [Context(torch.randn(1, 5, 32), torch.randn(1, 5, 16)) for _ in range(2)]
    video, audio = lay_out_video(SHAPE, 4, guides), lay_out_audio(SHAPE, 2, 8, given_audio, audio_mask)
    return JointDenoiser(transformer, video, audio, Conditioning(*contexts, model_id="tiny"), stg_blocks=(1,))


def tokens_for(denoiser: JointDenoiser) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn_like(denoiser.video.clean), torch.randn_like(denoiser.audio.clean)


def test_a_stream_made_anew_in_one_share_is_told_that_share_of_the_noise(transformer):
    given, mask = torch.randn(1, 2, SHAPE.audio_latents, 8), torch.full((1, 1, SHAPE.audio_latents, 1), 0.5)
    denoiser = make_denoiser(transformer, given_audio=given, audio_mask=mask)
    video, audio = tokens_for(denoiser)
    made = denoiser(video, audio, 0.6, "cond")[1]
    context = denoiser.conditioning.positive
    with torch.inference_mode():
        velocity = transformer(
            StreamInput(video, context.video, torch.tensor([0.6]), marked=denoiser.video.marked),
            StreamInput(
                audio,
                context.audio,
                torch.tensor([0.6]),
                torch.tensor([[0.3]]),
                torch.zeros(1, audio.shape[1], dtype=torch.long),
            ),
            transformer.rope_tables(denoiser.video.positions, denoiser.audio.positions),
        )[1]
    assert_near(made, audio - 0.3 * velocity, 1e-5)  # the same operations


def test_clean_tokens_follow_from_velocity_and_each_tokens_own_level(transformer):
    denoiser = make_denoiser(transformer, [Guide(latent(), 0, 1.0), Guide(latent(), 8, 0.75)])
    video, audio = tokens_for(denoiser)
    made_video, made_audio = denoiser(video, audio, 0.6, "cond")
    sigmas = 0.6 * denoiser.video.mask[..., 0]
    context, every = denoiser.conditioning.positive, torch.arange(sigmas.shape[1])[None]
    with torch.inference_mode():
        velocity, audio_velocity = transformer(
            StreamInput(video, context.video, torch.tensor([0.6]), sigmas, every, denoiser.video.marked),
            StreamInput(audio, context.audio, torch.tensor([0.6])),
            transformer.rope_tables(denoiser.video.positions, denoiser.audio.positions),
        )
    assert_near(made_video, video - sigmas.unsqueeze(-1) * velocity, 1e-5)  # levels grouped or not
    assert_near(made_audio, audio - 0.6 * audio_velocity, 1e-5)
    assert torch.equal(
        made_video[:, :FRAME_TOKENS], video[:, :FRAME_TOKENS]
    )  # held tokens are clean as they are


def test_passes_differ_in_what_they_name(transformer):
    denoiser = make_denoiser(transformer)
    video, audio = tokens_for(denoiser)
    made = {
        name: denoiser(video, audio, 0.6, name)[0] for name in ("cond", "uncond", "perturbed", "isolated")
    }
    assert len({tensor.sum().item() for tensor in made.values()}) == 4
    other = make_denoiser(transformer)
    swapped = Conditioning(denoiser.conditioning.negative, denoiser.conditioning.positive, "tiny")
    other = JointDenoiser(transformer, denoiser.video, denoiser.audio, swapped, stg_blocks=(1,))
    assert torch.equal(other(video, audio, 0.6, "cond")[0], made["uncond"])


def test_a_frozen_stream_is_at_level_zero_for_its_gates_and_text(transformer):
    given = torch.randn(1, 2, SHAPE.audio_latents, 8)
    denoiser = make_denoiser(transformer, given_audio=given)
    video, _ = tokens_for(denoiser)
    audio = denoiser.audio.clean
    made_video, made_audio = denoiser(video, audio, 0.6, "cond")
    assert torch.equal(made_audio, audio)
    context = denoiser.conditioning.positive
    with torch.inference_mode():
        velocity, _ = transformer(
            StreamInput(video, context.video, torch.tensor([0.6]), marked=denoiser.video.marked),
            StreamInput(audio, context.audio, torch.tensor([0.0])),
            transformer.rope_tables(denoiser.video.positions, denoiser.audio.positions),
        )
    # a frozen stream's own tokens are at level 0, too
    assert_near(made_video, video - 0.6 * velocity, 1e-5)
