"""Where every token of a clip stands, what it is held to and how strongly (spec section 2.9).

B batch (1), T video tokens with appended guides, S audio tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError, WorkflowError
from ..latents.patchify import audio_to_tokens, video_to_tokens
from ..layers.attention_groups import Groups
from ..shapes import ClipShape, audio_positions, frame_positions, reference_positions, video_positions
from ..values import Guide, check_places


@dataclass(frozen=True, slots=True)
class Layout:
    """One stream's tokens: the clip's own first, then those that guides append."""

    clean: Tensor  # (1, T, C) float32, what held tokens return to; 0 where nothing is given
    mask: Tensor  # (1, T, 1) float32, 1 denoise fully, 0 keep clean
    positions: Tensor  # (1, axes, T, 2) float32 bounds
    masks: tuple[float, ...]  # the distinct values of mask, known to the host
    level_of_token: Tensor  # (1, T) int64 into masks
    own_tokens: int  # the clip's own; none in what another stream sees alone
    marked: Tensor  # (1, T) bool, tokens that carry the keyframe marker
    timeless: Tensor  # (1, T) bool, tokens of references, which are of no moment of the clip
    groups: Groups | None = None  # which tokens see which; None: each sees all

    @property
    def frozen(self) -> bool:
        """Whether the whole stream is given: its noise level is 0 everywhere, gates and text included."""
        return self.masks == (0.0,)


def lay_out_video(
    shape: ClipShape,
    channels: int,
    guides: Sequence[Guide],
    given: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> Layout:
    """Tokens of a clip with its guides: a guide at frame 0 takes the first latents' place, others are appended.

    A reference (a guide of no frame) may be smaller than the clip in both directions by one whole number.

    given: (1, C, F, H, W), a video stream that stays as it is. given_mask: (1, 1, F, H, W), where it is made anew, 1 wholly.
    Raises WorkflowError for two guides in one place or one longer than the clip, ShapeError for one that reaches beyond it or
    has another size.
    """
    grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
    clean, mask = torch.zeros(1, channels, *grid), torch.ones(1, 1, *grid)
    if given is not None:
        _check_latent("given video", given, (1, channels, *grid))
        clean = given.float().clone()
        mask = torch.zeros(1, 1, *grid) if given_mask is None else _checked_mask("video", given_mask, mask)
        if guides and not mask.any():
            raise WorkflowError(
                "the video is kept whole, so no picture can be held: leave out the picture, or free a part by a noise mask"
            )
    # one that is not seen would still be heard: the sound sees all tokens
    appended = [
        guide for guide in guides if guide.frame != 0 and guide.attention and _freedom(guide).min() < 1
    ]
    for guide in _at_start(guides, shape):
        _check_latent("guide", guide.latent, (1, channels, guide.latent.shape[2], *grid[1:]))
        place = slice(guide.latent.shape[2])
        made = _freedom(guide) < mask[:, :, place]  # a token returns to what holds it more
        clean[:, :, place] = torch.where(made, guide.latent.float(), clean[:, :, place])
        mask[:, :, place] = torch.minimum(mask[:, :, place], _freedom(guide))
    cleans, masks, positions = [video_to_tokens(clean)], [video_to_tokens(mask)], [video_positions(shape)]
    for guide in appended:
        freedom = video_to_tokens(_freedom(guide))
        keeps = freedom[0, :, 0] < 1  # others would be noise that the clip sees
        cleans.append(video_to_tokens(guide.latent.float())[:, keeps])
        masks.append(freedom[:, keeps])
        positions.append(_appended_positions(guide, shape, channels)[:, :, keeps])
    counts = [tokens.shape[1] for tokens in cleans]
    marked = torch.arange(sum(counts)) < shape.latent_height * shape.latent_width
    of_reference = torch.tensor([False, *(guide.frame is None for guide in appended)])
    layout = _layout(cleans, masks, positions, shape.video_tokens)
    return replace(
        layout,
        groups=_groups(counts, appended),
        marked=marked.unsqueeze(0),
        timeless=of_reference.repeat_interleave(torch.tensor(counts)).unsqueeze(0),
    )


def lay_out_audio(
    shape: ClipShape,
    channels: int,
    bins: int,
    given: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> Layout:
    """Tokens of a clip's sound.

    given: (1, C, L, M), a sound that stays as it is. given_mask: (1, 1, L, 1), where it is made anew, 1 wholly.
    """
    size = (1, channels, shape.audio_latents, bins)
    if given is not None:
        _check_latent("given audio", given, size)
    clean = torch.zeros(size) if given is None else given.float()
    tokens = audio_to_tokens(clean)
    mask = torch.full_like(tokens[..., :1], 1.0 if given is None else 0.0)
    if given is not None and given_mask is not None:
        mask = _checked_mask("audio", given_mask, torch.ones(1, 1, shape.audio_latents, 1))[:, 0]
    positions = audio_positions(shape.audio_latents, shape.audio_rate)
    return _layout([tokens], [mask], [positions], tokens.shape[1])


def held(layout: Layout) -> Layout:
    """The tokens of a layout that are given, wholly or in part, as what another stream that is made first sees of it.

    A reference is moved a second ahead of the clip: without the clip's own tokens it would be taken for its first picture.
    """
    given = held_tokens(layout)
    positions = layout.positions.clone()
    positions[:, 0] -= layout.timeless.to(positions).unsqueeze(-1)
    return Layout(
        clean=layout.clean[:, given],
        mask=torch.zeros_like(layout.mask[:, given]),
        positions=positions[:, :, given],
        masks=(0.0,),
        level_of_token=torch.zeros_like(layout.level_of_token[:, given]),
        own_tokens=0,
        marked=layout.marked[:, given],
        timeless=layout.timeless[:, given],
    )


def held_tokens(layout: Layout) -> Tensor:
    """Which tokens are given, wholly or in part: (T,) bool."""
    return layout.mask[0, :, 0] < 1


def _layout(cleans: list[Tensor], masks: list[Tensor], positions: list[Tensor], own_tokens: int) -> Layout:
    mask = torch.cat(masks, dim=1)
    none = torch.zeros(mask.shape[:2], dtype=torch.bool)
    values, index = torch.unique(mask[..., 0], return_inverse=True)
    return Layout(
        clean=torch.cat(cleans, dim=1),
        mask=mask,
        positions=torch.cat(positions, dim=2),
        masks=tuple(values.tolist()),
        level_of_token=index,
        own_tokens=own_tokens,
        marked=none,
        timeless=none,
    )


def _groups(tokens: list[int], appended: Sequence[Guide]) -> Groups | None:
    """Guides with an attention of their own see the clip to that degree, and of other guides nothing (spec section 2.7)."""
    degrees = [1.0, *(guide.attention for guide in appended)]
    if all(degree == 1 for degree in degrees):
        return None

    def strength(one: int, other: int) -> float:
        if one == other:
            return 1.0
        both = degrees[one] * degrees[other]
        return both if 0 in (one, other) else float(both == 1)  # the clip is group 0

    places = range(len(degrees))
    return Groups(tuple(tokens), tuple(tuple(strength(one, other) for other in places) for one in places))


def _at_start(guides: Sequence[Guide], shape: ClipShape) -> list[Guide]:
    for guide in guides:
        if not 0 <= guide.strength <= 1:
            raise WorkflowError(f"guide strength {guide.strength} must lie between 0 and 1")
        if not 0 <= guide.attention <= 1:
            raise WorkflowError(f"guide attention {guide.attention} must lie between 0 and 1")
        if guide.latent.shape[2] > shape.latent_frames:
            raise WorkflowError(
                f"a guide of {guide.latent.shape[2]} latent frames does not fit {shape.latent_frames}"
            )
    check_places((guide.frame, guide.attention) for guide in guides)
    if [guide.frame for guide in guides].count(None) > 1:
        raise WorkflowError("two reference pictures, a clip takes one: leave one of them out")
    return [guide for guide in guides if guide.frame == 0]


def _appended_positions(guide: Guide, shape: ClipShape, channels: int) -> Tensor:
    frames, rows, columns = guide.latent.shape[2:]
    times = max(1, shape.latent_height // rows) if guide.frame is None else 1
    needed = (shape.latent_height // times, shape.latent_width // times)
    _check_latent("guide", guide.latent, (1, channels, frames, *needed))
    if guide.frame is not None:
        return frame_positions(shape, guide.frame, frames)
    return reference_positions(shape, frames, rows, columns, downscale=times)


def _freedom(guide: Guide) -> Tensor:
    """How far each latent of a guide may change: (1, 1, f, H, W), 1 wholly."""
    kept = torch.ones_like(guide.latent[:, :1], dtype=torch.float32)
    if guide.mask is not None:
        kept = 1 - _checked_mask("guide", guide.mask, kept)
    return 1 - guide.strength * kept


def _checked_mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    if mask.shape != like.shape or not ((mask >= 0) & (mask <= 1)).all():
        raise ShapeError(
            f"{name} mask of shape {tuple(mask.shape)} needs the shape {tuple(like.shape)} and values of 0 to 1"
        )
    return mask.float().clone()


def _check_latent(name: str, latent: Tensor, needed: tuple[int, ...]) -> None:
    if tuple(latent.shape) != needed:
        raise ShapeError(
            f"{name} has latents of shape {tuple(latent.shape)}, this clip needs {needed}: encode it again"
        )
