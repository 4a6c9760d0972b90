"""Groups of tokens that see each other to a degree: what a dense mask gives, without one."""

from dataclasses import replace

import pytest
import torch
from test_audio_codec import assert_near, seeded
from test_sharing import PASSES, assert_steps_agree, make, tokens
from tiny_models import TRANSFORMERS
from torch.nn import functional

from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video
from lockstep.model.errors import WorkflowError
from lockstep.model.layers.attention_groups import Groups, attend_in_groups
from lockstep.model.residency import MemoryCount
from lockstep.model.shapes import ClipShape
from lockstep.model.transformer.config import TransformerConfig
from lockstep.model.transformer.model import AVTransformer, StreamInput
from lockstep.model.values import Guide

SHAPE = ClipShape(17, 64, 96, 24.0)  # 3 x 2 x 3 latents, 18 tokens
MIXED = Groups((7, 3, 4), ((1.0, 0.3, 1.0), (0.3, 1.0, 0.0), (0.5, 0.0, 1.0)))
HIDDEN = Groups((7, 3, 4), ((1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)))


def dense(groups: Groups) -> torch.Tensor:
    """The same as an additive mask of all tokens by all."""
    strengths = torch.tensor(groups.strengths)
    sizes = torch.tensor(groups.tokens)
    full = strengths.repeat_interleave(sizes, dim=0).repeat_interleave(sizes, dim=1)
    return full.log().clamp(min=torch.finfo(torch.float32).min)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("groups", [MIXED, HIDDEN, Groups((14,), ((1.0,),))])
def test_groups_attend_as_with_a_dense_mask(groups, inference):
    query, key, value = (torch.randn(2, 3, 14, 16) for _ in range(3))
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=dense(groups))
    with torch.inference_mode(inference):
        assert_near(attend_in_groups(query, key, value, groups), wanted, 1e-5)


def test_groups_in_16_bits_stay_within_their_rounding():
    query, key, value = (torch.randn(1, 2, 14, 16) for _ in range(3))
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=dense(MIXED))
    made = attend_in_groups(*(x.bfloat16() for x in (query, key, value)), MIXED)
    assert (
        made.float() - wanted
    ).norm() < 2**-6 * wanted.norm()  # inputs, weights and result rounded to 2^-9


def test_groups_take_memory_for_tokens_not_for_their_square():
    count = 3000
    groups = Groups((count - 1000, 1000), ((1.0, 0.5), (0.5, 1.0)))
    query, key, value = (torch.randn(1, 2, count, 8) for _ in range(3))
    with MemoryCount() as memory:
        attend_in_groups(query, key, value, groups)
    assert memory.peak < count * count / 4  # bytes; a mask alone would be sixteen times as much


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_with_groups_is_that_with_the_dense_mask(name):
    config = TransformerConfig.from_published(TRANSFORMERS[name])
    transformer = seeded(AVTransformer(config))
    guides = [
        Guide(torch.randn(1, 4, 1, 2, 3), 8, 1.0),
        Guide(torch.randn(1, 4, 1, 2, 3), None, 1.0, None, 0.4),
    ]
    video, audio = lay_out_video(SHAPE, 4, guides), lay_out_audio(SHAPE, 2, 8)
    # as diffusers 0.42.1 has it, _build_video_self_attention_mask of LTX2InContextPipeline: keyframe and reference apart
    assert video.groups == Groups((18, 6, 6), ((1.0, 1.0, 0.4), (1.0, 1.0, 0.0), (0.4, 0.0, 1.0)))
    rope = transformer.rope_tables(video.positions, audio.positions)
    widths = [config.caption_width] * 2 if config.caption_width else [config.video.width, config.audio.width]
    streams = [
        StreamInput(torch.randn(layout.clean.shape), torch.randn(1, 5, width), torch.tensor([0.7]))
        for layout, width in zip((video, audio), widths, strict=True)
    ]
    grouped = transformer(replace(streams[0], groups=video.groups), streams[1], rope)
    masked = transformer(replace(streams[0], self_bias=dense(video.groups)), streams[1], rope)
    plain = transformer(*streams, rope)
    for made, wanted in zip(grouped, masked, strict=True):
        assert_near(made, wanted, 1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(grouped[0], plain[0], atol=1e-3)


def test_what_is_hidden_changes_nothing():
    """With attention 0 the clip does not see its reference; sound does, so the streams are kept apart."""
    name, own = "2.3", make("2.3", (), ("cond",)).video.own_tokens
    pictures = [torch.randn(1, 4, 1, 2, 3) for _ in range(2)]
    made = []
    for picture in pictures:
        denoiser = make(name, (), ("isolated",), guides=[Guide(picture, None, 1.0, None, 0.0)])
        given = tokens(denoiser, 1)
        given[0][:, own:] = denoiser.video.clean[:, own:]
        made.append(denoiser(*given, 0.9, "isolated")[0][:, :own])
    assert torch.equal(*made)


def test_guided_passes_share_with_groups_as_without():
    guides = [Guide(torch.randn(1, 4, 1, 2, 3), None, 1.0, None, 0.5)]
    sharing = make("2.3", (2,), PASSES, guides=guides)
    assert sharing.video.groups is not None
    assert_steps_agree(sharing, make("2.3", (2,), ("cond",), text_memory_bytes=0, guides=guides))


def test_guides_see_of_each_other_only_what_is_as_trained():
    degrees = ((8, 1.0), (9, 1.0), (10, 0.5), (11, 0.25))
    guides = [Guide(torch.randn(1, 4, 1, 2, 3), frame, 1.0, None, degree) for frame, degree in degrees]
    groups = lay_out_video(SHAPE, 4, guides).groups
    assert groups is not None
    assert groups.strengths[0] == (1, 1, 1, 0.5, 0.25)
    assert groups.strengths[1:3] == ((1, 1, 1, 0, 0), (1, 1, 1, 0, 0))
    assert groups.strengths[3:] == ((0.5, 0, 0, 1, 0), (0.25, 0, 0, 0, 1))


def test_guides_that_are_seen_as_trained_need_no_groups():
    picture = torch.randn(1, 4, 1, 2, 3)
    assert lay_out_video(SHAPE, 4, [Guide(picture, 8, 0.5), Guide(picture, None, 1.0)]).groups is None


@pytest.mark.parametrize(
    ("guide", "told"),
    [
        (
            Guide(torch.zeros(1, 4, 1, 2, 3), None, 1.0, None, 1.5),
            "guide attention 1.5 must lie between 0 and 1",
        ),
        (Guide(torch.zeros(1, 4, 1, 2, 3), 0, 1.0, None, 0.5), "a picture at frame 0 is part of the clip"),
    ],
)
def test_attention_that_has_no_meaning_is_refused(guide, told):
    with pytest.raises(WorkflowError, match=told):
        lay_out_video(SHAPE, 4, [guide])
