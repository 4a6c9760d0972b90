"""The node layer without ComfyUI: conversions, and that texts, help and workflows fit the nodes as ComfyUI shows them.

tests/host/object_info.json is what a real ComfyUI says of the nodes; tests/host proves that it still does.
"""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lockstep
from lockstep.model.engine import SampleSettings, latent_sha256
from lockstep.model.errors import MediaError, ShapeError, WorkflowError
from lockstep.model.shapes import ClipShape, Compression
from lockstep.model.values import AVLatents, Conditioning, Context, Lora
from lockstep.nodes import history, types
from lockstep.nodes.refining import refining_levels
from lockstep.nodes.with_loras import add_lora

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "tests/host/object_info.json").read_text(encoding="utf-8"))
OURS = sorted(name for name in SCHEMA if name.startswith("Lockstep"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LANGUAGES = ("en", "zh", "ja")
AFTER_A_SEED = ("fixed", "increment", "decrement", "randomize")


def script() -> types.Script:
    contexts = [Context(torch.randn(1, 4, 6), torch.randn(1, 4, 3)) for _ in range(2)]
    return types.Script(Conditioning(*contexts, model_id="tiny/1"))


def latents() -> AVLatents:
    shape = ClipShape(9, 64, 96, 12.0, Compression(4, 16))
    return AVLatents(torch.randn(1, 8, 3, 4, 6), torch.randn(1, 2, 19, 5), shape, "tiny/1")


# Text and pictures


def test_a_prompt_and_its_pictures_travel_in_a_conditioning():
    given = script()
    plain = types.to_conditioning(given)
    assert plain[0][0] is given.text.positive.video
    assert plain[0][1]["pooled_output"].shape == (1, 6)
    first = types.with_picture(plain, types.to_picture(torch.rand(1, 3, 5, 3), 0, 1.0))
    both = types.with_picture(first, types.to_picture(torch.rand(1, 3, 5, 3), -1, 0.5))
    assert [picture.frame for picture in types.from_conditioning(both).pictures] == [0, -1]
    assert types.from_conditioning(plain).pictures == ()
    assert types.from_conditioning(both).text is given.text


def test_copies_of_a_conditioning_are_welcome():
    ((context, extras),) = types.to_conditioning(script())
    types.from_conditioning([[context.clone(), dict(extras) | {"strength": 1.0}]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: [[c[0][0], {"pooled_output": None}]], "another text encoder"),
        (lambda c: [], "another text encoder"),
        (lambda c: [[torch.zeros_like(c[0][0]), c[0][1]]], "changed by a node in between"),
        (lambda c: [[torch.cat([c[0][0]] * 2, 1), c[0][1]]], "changed by a node in between"),
        (lambda c: c + c, "holds 2 prompts"),
        (
            lambda c: [[c[0][0], c[0][1] | {"start_percent": 0.0, "end_percent": 0.5}]],
            "holds start_percent and end_percent of a node in between",
        ),
        (lambda c: [[c[0][0], c[0][1] | {"control": object()}]], "holds control of a node in between"),
    ],
)
def test_a_conditioning_that_is_not_ours_is_refused(change, sentence):
    with pytest.raises(WorkflowError, match=sentence):
        types.from_conditioning(change(types.to_conditioning(script())))


def test_grey_becomes_rgb_and_transparency_lies_on_white():
    grey = types.to_picture(torch.full((1, 2, 3, 1), 0.25), 0, 1.0).image
    assert grey.shape == (2, 3, 3)
    assert (grey == 0.25).all()
    seen = types.to_picture(torch.tensor([0.5, 0.0, 0.0, 0.5]).expand(1, 2, 3, 4), 0, 1.0).image
    assert torch.equal(seen[0, 0], torch.tensor([0.75, 0.5, 0.5]))


def test_values_outside_of_a_picture_s_range_are_cut():
    image = types.to_picture(torch.tensor([-1.0, 0.5, 2.0]).expand(1, 2, 2, 3), 0, 1.0).image
    assert torch.equal(image[0, 0], torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (0, 4, 4, 3), (4, 4, 3), (1, 4, 4, 2)])
def test_anything_but_one_picture_is_refused(shape):
    with pytest.raises(MediaError, match="image"):
        types.to_picture(torch.zeros(shape), 0, 1.0)


def test_a_mask_is_stretched_over_its_picture():
    mask = torch.tensor([[[1.0, 0.0]]])
    stretched = types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, mask).mask
    assert (stretched > 0.5).tolist() == [[True] * 4 + [False] * 4] * 4


def test_the_mask_of_a_picture_without_alpha_is_none():
    assert types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, torch.zeros(1, 64, 64)).mask is None


@pytest.mark.parametrize("mask", [torch.ones(1, 4, 8), torch.ones(2, 4, 8), torch.ones(4, 8)])
def test_a_mask_that_leaves_nothing_or_is_several_is_refused(mask):
    with pytest.raises(MediaError, match="mask"):
        types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, mask)


def test_frames_count_from_either_end():
    def at(frame: int) -> int:
        return types.frame_of(types.Picture(torch.zeros(2, 2, 3), frame, 1.0), latents().shape)

    assert [at(frame) for frame in (0, 8, -1, -9)] == [0, 8, 8, 0]
    for frame in (9, -10):
        with pytest.raises(ShapeError, match="use 0 to 8"):
            at(frame)


def test_size_is_what_the_three_inputs_say():
    assert types.size_of(types.OWN_ASPECT, 32, 48) is None
    assert types.size_of("16:9", 32, 48) == "16:9"
    assert types.size_of(types.CUSTOM_ASPECT, 32, 48) == "32x48"


# Latents and sound


class Nested:
    """What ComfyUI packs a joint latent into."""

    is_nested = True

    def __init__(self, *streams: torch.Tensor):
        self.streams = streams

    def unbind(self) -> tuple[torch.Tensor, ...]:
        return self.streams


def parts(made: AVLatents | None = None) -> tuple[dict, dict, dict]:
    return types.to_latents(made or latents(), lambda streams: Nested(*streams))


def test_latents_come_back_as_they_went():
    made = latents()
    video, audio, joint = parts(made)
    assert audio["type"] == "audio"
    for source in (video, joint):
        back = types.from_video_latent(source)
        assert torch.equal(back.video, made.video)
        assert (back.shape, back.model_id) == (made.shape, made.model_id)
    for source in (audio, joint):
        back = types.from_audio_latent(source)
        assert torch.equal(back.audio, made.audio)
        assert (back.shape, back.model_id) == (made.shape, made.model_id)
    for alone in (video, audio):
        with pytest.raises(ShapeError, match="connect an av_latent output"):
            types.from_joint_latent(alone)
    both = types.from_joint_latent(joint)
    assert torch.equal(both.video, made.video)
    assert torch.equal(both.audio, made.audio)


def test_latents_joined_and_separated_by_other_nodes_still_decode():
    made = latents()
    video, audio, _ = parts(made)
    joint = video | audio | {"samples": Nested(made.video + 1, made.audio + 1)}
    assert torch.equal(types.from_video_latent(joint).video, made.video + 1)
    apart = joint | {"samples": joint["samples"].unbind()[1]}
    assert torch.equal(types.from_audio_latent(apart).audio, made.audio + 1)


def test_a_cropped_or_enlarged_latent_has_its_own_size():
    video, _, _ = parts()
    video = video | {"samples": torch.zeros(1, 8, 5, 8, 2, dtype=torch.float16)}
    back = types.from_video_latent(video)
    assert (back.shape.frames, back.shape.height, back.shape.width, back.shape.fps) == (17, 128, 32, 12.0)
    assert back.video.dtype == torch.float32


@pytest.mark.parametrize(
    ("stream", "change", "error", "sentence"),
    [
        (0, {"lockstep": None}, WorkflowError, "video was not made by a Lockstep node"),
        (0, {"samples": torch.zeros(2, 8, 3, 4, 6)}, ShapeError, "video holds 2 clips"),
        (0, {"samples": torch.zeros(1, 4, 3, 4, 6)}, ShapeError, "connect a latent of this model"),
        (0, {"samples": torch.zeros(1, 8, 3)}, ShapeError, "connect a latent of this model"),
        (0, {"samples": torch.zeros(1, 2, 19, 5)}, ShapeError, "video output, not audio"),
        (1, {"samples": torch.zeros(1, 8, 3, 4, 6)}, ShapeError, "audio output, not video"),
        (1, {"samples": torch.zeros(1, 2, 9, 5)}, ShapeError, "the sampler made 19"),
        (1, {"samples": torch.zeros(1, 2, 19, 4)}, ShapeError, "connect a latent of this model"),
    ],
)
def test_latents_that_do_not_fit_are_refused(stream, change, error, sentence):
    convert = (types.from_video_latent, types.from_audio_latent)[stream]
    with pytest.raises(error, match=sentence):
        convert(parts()[stream] | change)


# What the sampler is given


def test_a_latent_without_a_mask_sets_the_size_alone():
    streams = types.given_streams(parts()[2], None, "tiny/1")
    assert {name: stream.mask for name, stream in streams.items()} == {"video": None, "audio": None}
    assert streams["video"].shape == latents().shape
    assert types.given_streams(None, None, "tiny/1") == {}


def test_encoded_clips_stay_as_they_are():
    made = latents()
    streams = types.given_streams(types.to_kept_video(made), types.to_kept_audio(made), "tiny/1")
    assert torch.equal(streams["video"].samples, made.video)
    assert torch.equal(streams["audio"].samples, made.audio)
    assert streams["video"].mask.shape == (1, 1, 3, 4, 6)
    assert streams["audio"].mask.shape == (1, 1, 19, 1)
    assert not streams["video"].mask.any()
    assert not streams["audio"].mask.any()


def test_masks_of_every_layout_fit_the_latents():
    def mask_of(noise_mask: torch.Tensor) -> torch.Tensor | None:
        return types.given_streams(parts()[0] | {"noise_mask": noise_mask}, None, "tiny/1")["video"].mask

    left = torch.zeros(64, 96)
    left[:, :48] = 1
    for mask in (left[None], left[None, None], left[None, None, None]):
        assert mask_of(mask)[0, 0, 2, 1].tolist() == [1, 1, 1, 0, 0, 0]
    pictures = torch.zeros(
        9, 1, 64, 96
    )  # one for each, the first latent stands for one picture, the others for four
    pictures[1] = 1
    assert mask_of(pictures)[0, 0, :, 0, 0].tolist() == [0, 1, 0]
    frames = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1, 1)
    assert mask_of(frames)[0, 0, :, 3, 5].tolist() == [0, 0.5, 1]
    assert mask_of(torch.ones(1, 1, 8, 8)) is None  # all of it is made anew


def test_masks_of_a_joint_latent_belong_to_their_streams():
    sound = torch.zeros(1, 1, 19, 1)
    sound[:, :, 10:] = 1
    joint = parts()[2] | {"noise_mask": Nested(torch.ones(1, 1, 3, 1, 1), sound)}
    streams = types.given_streams(joint, None, "tiny/1")
    assert streams["video"].mask is None
    assert streams["audio"].mask[0, 0, :, 0].tolist() == [0] * 10 + [1] * 9
    alone = types.given_streams(parts()[2] | {"noise_mask": torch.zeros(1, 1, 8, 8)}, None, "tiny/1")
    assert alone["audio"].mask is None
    assert not alone["video"].mask.any()


def test_a_mask_with_the_channels_of_its_latent_is_read():
    """As ComfyUI's LTXVConcatAVLatent makes for the stream that has none."""
    sound = torch.ones(1, 2, 19, 5)
    sound[:, :, :7] = 0
    joint = parts()[2] | {"noise_mask": Nested(torch.zeros(1, 8, 3, 4, 6), sound)}
    streams = types.given_streams(joint, None, "tiny/1")
    assert not streams["video"].mask.any()
    assert streams["audio"].mask[0, 0, :, 0].tolist() == [0] * 7 + [1] * 12


def test_given_latents_that_do_not_fit_are_refused():
    video, audio, joint = parts()
    with pytest.raises(WorkflowError, match=r"^audio_latent was made by tiny/1, the sampler runs other/2"):
        types.given_streams(None, audio, "other/2")
    with pytest.raises(WorkflowError, match=r"latent was made by tiny/1, the sampler runs other/2"):
        types.given_streams(joint, None, "other/2")
    with pytest.raises(ShapeError, match="audio_latent holds a video and no sound"):
        types.given_streams(None, video, "tiny/1")
    with pytest.raises(WorkflowError, match="audio_latent was not made by a Lockstep node"):
        types.given_streams(None, {"samples": audio["samples"]}, "tiny/1")


def test_a_given_sound_is_cut_to_the_clip_and_may_not_be_shorter():
    sound = types.given_streams(None, types.to_kept_audio(latents()), "tiny/1")["audio"]
    shorter = types.replace(latents().shape, frames=5)
    cut = types.fit_sound_to(sound, shorter)
    assert cut.samples.shape[2] == cut.mask.shape[2] == shorter.audio_latents < 19
    with pytest.raises(ShapeError, match=r"has 19 latents, a clip of 1\.08333 s needs 27"):
        types.fit_sound_to(sound, types.replace(latents().shape, frames=13))


# Clips from outside


def shape_of(size, seconds, fps) -> ClipShape:
    """As Engine.shape, for a model of 12 frames per second without limits."""
    width, height = (64, 64) if size is None else map(int, size.split("x"))
    frames = 25 if seconds is None else round((seconds * (fps or 12.0) - 1) / 4) * 4 + 1
    return ClipShape(frames, height, width, fps or 12.0, Compression(4, 16))


def test_pictures_become_pixels_and_measures():
    images = torch.rand(9, 32, 48, 3)
    pixels, shape = types.to_pixels(images, 0.0, shape_of)
    assert torch.equal(pixels[0, :, 4].permute(1, 2, 0), images[4] * 2 - 1)
    assert (shape.frames, shape.height, shape.width, shape.fps) == (9, 32, 48, 12.0)
    assert types.to_pixels(images, 24.0, shape_of)[1].fps == 24.0


@pytest.mark.parametrize(
    ("size", "error", "sentence"),
    [
        ((8, 32, 48, 3), ShapeError, "images: frames must be 4k.1, got 8: use 5 or 9"),
        ((9, 30, 48, 3), ShapeError, "images: height must be a multiple of 16 pixels, got 30: use 16 or 32"),
        ((9, 32, 48, 2), MediaError, "images has the shape"),
        ((0, 32, 48, 3), MediaError, "images has the shape"),
    ],
)
def test_pictures_that_the_codec_cannot_hold_are_refused(size, error, sentence):
    with pytest.raises(error, match=sentence):
        types.to_pixels(torch.zeros(size), 0.0, shape_of)


@pytest.mark.parametrize(("channels", "shown"), [(1, 0.25), (3, 0.25), (4, 0.625)])
def test_pictures_of_every_kind_become_rgb(channels, shown):
    """Half transparent on white: 0.25 * 0.5 + 0.5."""
    images = torch.full((9, 32, 48, channels), 0.25)
    images[..., 3:] = 0.5
    pixels, _ = types.to_pixels(images, 0.0, shape_of)
    assert pixels.shape == (1, 3, 9, 32, 48)
    assert torch.allclose(pixels, torch.tensor(shown * 2 - 1))
    assert torch.allclose(types.to_clip(images, 12.0, None).frames, torch.tensor(shown))


def test_sound_comes_with_its_rate():
    waveform, rate = types.from_audio({"waveform": torch.ones(1, 2, 5), "sample_rate": 44100})
    assert (tuple(waveform.shape), rate) == ((2, 5), 44100)


@pytest.mark.parametrize(
    "waveform",
    [
        torch.zeros(2, 1, 5),
        torch.zeros(1, 0, 5),
        torch.zeros(1, 1, 0),
        torch.zeros(5),
        torch.full((1, 1, 5), torch.nan),
    ],
)
def test_anything_but_one_sound_is_refused(waveform):
    with pytest.raises(MediaError, match="audio"):
        types.from_audio({"waveform": waveform, "sample_rate": 16000})


def test_a_clip_to_be_looked_at_keeps_what_is_wrong_with_it():
    frames = torch.full((5, 4, 6, 3), torch.nan)
    clip = types.to_clip(frames, 12.0, {"waveform": torch.full((1, 2, 9), torch.inf), "sample_rate": 8000})
    assert clip.frames.isnan().all()
    assert clip.waveform is not None
    assert (tuple(clip.waveform.shape), clip.sample_rate_hz) == ((2, 9), 8000)
    assert types.to_clip(frames, 12.0, None).waveform is None
    with pytest.raises(MediaError, match="images has the shape"):
        types.to_clip(frames[..., :2], 12.0, None)
    with pytest.raises(MediaError, match="one sound"):
        types.to_clip(frames, 12.0, {"waveform": torch.zeros(2, 1, 9), "sample_rate": 8000})
    with pytest.raises(MediaError, match="0 samples per second"):
        types.to_clip(frames, 12.0, {"waveform": torch.zeros(1, 1, 9), "sample_rate": 0})


@pytest.mark.parametrize(
    ("channels", "rate_hz", "held"),
    [
        (1, 16000, (1, 16000)),
        (2, 48000, (2, 48000)),
        (6, 44100, (2, 44100)),
        (2, 192000, (2, 96000)),
        (1, 5, (1, 8000)),
    ],
)
def test_any_sound_fits_into_an_mp4(channels, rate_hz, held):
    waveform = torch.full((1, channels, rate_hz), 0.25)
    made = types.to_encodable(
        types.to_clip(torch.zeros(2, 4, 4, 3), 2.0, {"waveform": waveform, "sample_rate": rate_hz})
    )
    assert made.waveform is not None
    assert (len(made.waveform), made.sample_rate_hz) == held
    assert made.waveform.shape[1] == held[1]  # one second stays one second
    silent = types.to_clip(torch.zeros(2, 4, 4, 3), 2.0, None)
    assert types.to_encodable(silent) is silent


# Models with LoRAs, and refining


class Recorder:
    """Stands for an engine: what reached it, and the recipe of a distilled LoRA."""

    def __init__(self):
        self.seen, self.blocks = [], 12
        self.recipe = SimpleNamespace(sigmas=None)

    def choose_recipe(self, loras=()):
        return SimpleNamespace(
            sigmas=(1.0, 0.0) if loras else None, refine_sigmas=(0.9, 0.0), temporal_sigmas=(0.8, 0.0)
        )

    def read_loras(self, loras):
        return tuple(f"{lora.path.name} read" for lora in loras)

    def encode_text(self, *given, loras):
        self.seen.append(("text", given, loras))

    def sample(self, _conditioning, _shape, _guides, settings, seed, **_named):
        self.seen.append(("sample", seed, settings.loras))

    def sigmas(self, steps, _shape, recipe=None):
        count = steps or 4
        return (*(1 - i / count for i in range(count)), 0.0)


def test_loras_add_up_on_a_shared_engine_and_reach_text_and_sampler():
    engine, first, second = Recorder(), Lora(Path("a"), 0.5), Lora(Path("b"))
    one, told = add_lora(engine, first)
    both, _ = add_lora(one, second)
    assert (told, one.loras, both.loras) == (("a read",), (first,), (first, second))
    assert both.engine is engine
    assert both.blocks == 12
    assert (engine.recipe.sigmas, both.recipe.sigmas) == (None, (1.0, 0.0))
    both.encode_text("a red ball", "")
    both.sample(None, None, [], SampleSettings(), 7)
    assert engine.seen == [("text", ("a red ball", ""), (first, second)), ("sample", 7, (first, second))]


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        (" Spatial ", (0.9, 0.0)),
        ("temporal", (0.8, 0.0)),
        ("0.9, 0.5, 0", (0.9, 0.5, 0.0)),
        ("1", (1.0, 0.75, 0.5, 0.25, 0.0)),
        ("0.5", (0.5, 0.375, 0.25, 0.125, 0.0)),
        ("0.9", pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))),
        ("0.99", pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))),
        (str(4 / 5), pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))),
    ],
)
def test_refining_starts_at_the_levels_asked_for(words, levels):
    model, _ = add_lora(Recorder(), Lora(Path("a")))
    assert refining_levels(words, model, None, latents().shape) == levels


@pytest.mark.parametrize("words", ["a bit", ",", "0", "1e-9", "1.5", "-0.5", "nan", "0.5 of it"])
def test_refining_by_other_words_is_refused(words):
    with pytest.raises(WorkflowError, match="use spatial or temporal after Lockstep Latent Upscale"):
        refining_levels(words, Recorder(), None, latents().shape)


def test_a_reference_stands_at_no_frame():
    picture = types.to_picture(torch.rand(1, 3, 5, 3), None, 1.0)
    assert types.frame_of(picture, latents().shape) is None


# What comes out


def test_sound_gets_a_batch_and_its_rate():
    audio = types.to_audio(torch.zeros(2, 100), 24000)
    assert audio["waveform"].shape == (1, 2, 100)
    assert audio["waveform"].is_contiguous()
    assert audio["sample_rate"] == 24000


def test_a_still_has_the_frame_s_colours():
    frame = torch.zeros(4, 6, 3)
    frame[1, 2] = torch.tensor([1.0, 0.5, 2.0])
    still = types.to_still(frame)
    assert still.size == (6, 4)
    assert still.getpixel((2, 1)) == (255, 128, 255)


# What runs cost


def test_what_a_clip_cost_is_found_by_its_latents_whichever_node_decoded_them():
    made, engine = latents(), SimpleNamespace(device=torch.device("cpu"))
    with history.measured(engine, "sample") as sampling:
        pass
    history.note(made, sampling, seed=7)
    for stage, stream in (("video", {"audio": torch.empty(0)}), ("audio", {"video": torch.empty(0)})):
        with history.measured(engine, stage) as decoding:
            pass
        history.note(replace(made, **stream), decoding)
    told = history.tell(made)
    assert list(told["stages"]) == ["sample", "video", "audio"]
    assert (told["seed"], told["latent_sha256"]) == (7, latent_sha256(made))
    assert all(cost["peak_rss_bytes"] for cost in told["costs"].values())
    assert told["energy"]["joules"] is None or told["energy"]["joules"] >= 0
    other = history.tell(latents())
    assert (other["stages"], "seed" in other) == ({}, False)


def test_of_many_runs_the_last_are_remembered():
    meter = SimpleNamespace(costs={})
    for number in range(2 * history._MOST):
        history.note(replace(latents(), video=torch.full((1,), float(number))), meter)
    assert len(history._known) == history._MOST


# The pack as ComfyUI finds it


def test_the_entry_is_importable_without_comfyui():
    assert inspect.iscoroutinefunction(lockstep.comfy_entrypoint)
    assert (ROOT / lockstep.WEB_DIRECTORY / "docs").is_dir()
    assert not hasattr(lockstep, "NODE_CLASS_MAPPINGS")  # it would switch the entry off
    assert not [name for name in sys.modules if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths")]


def inputs_of(node: str) -> dict[str, list]:
    sections = SCHEMA[node]["input"]
    return {**sections["required"], **sections.get("optional", {})}


@pytest.mark.parametrize("node", OURS)
def test_every_input_and_output_is_explained_and_has_its_range(node):
    assert SCHEMA[node]["category"] == "Lockstep"
    assert SCHEMA[node]["description"]
    assert all(SCHEMA[node]["output_tooltips"])
    for name, (kind, options) in inputs_of(node).items():
        assert options["tooltip"], name
        needed = {"INT": {"default", "min", "max", "step"}, "COMBO": {"default"}, "STRING": {"default"}}
        needed["FLOAT"] = needed["INT"]
        assert needed.get(kind, set()) <= set(options), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated_whole(language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert sorted(texts) == OURS
    for node, text in texts.items():
        assert text["display_name"]
        assert text["description"]
        assert list(text["inputs"]) == list(inputs_of(node))
        assert list(text["outputs"]) == [str(slot) for slot in range(len(SCHEMA[node]["output"]))]
        for part in (*text["inputs"].values(), *text["outputs"].values()):
            assert part["name"]
            assert part["tooltip"]


@pytest.mark.parametrize("node", OURS)
def test_the_english_texts_are_the_nodes_own(node):
    texts = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))[node]
    own = SCHEMA[node]
    assert (texts["display_name"], texts["description"]) == (own["display_name"], own["description"])
    for name, (_, options) in inputs_of(node).items():
        assert texts["inputs"][name] == {"name": name, "tooltip": options["tooltip"]}
    shown = [
        {"name": n, "tooltip": t} for n, t in zip(own["output_name"], own["output_tooltips"], strict=True)
    ]
    assert list(texts["outputs"].values()) == shown


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_socket_has_a_name_in_every_language(language):
    texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    assert texts["dataTypes"]["LOCKSTEP_MODEL"]


def test_the_socket_has_its_colour():
    assert "LOCKSTEP_MODEL" in (ROOT / "web/lockstep.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("node", OURS)
def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(node):
    page = (ROOT / "web/docs" / f"{node}.md").read_text(encoding="utf-8")
    title = SCHEMA[node]["display_name"]
    assert page.startswith(f"# {title}\n\n![{title}]({node}.jpg)\n")
    assert (ROOT / "web/docs" / f"{node}.jpg").is_file()
    for name in inputs_of(node):
        assert name in page, name
    for name in SCHEMA[node]["output_name"]:
        assert f"`{name}`" in page, name


def test_help_pages_are_those_of_nodes():
    assert sorted(page.stem for page in (ROOT / "web/docs").glob("*.md")) == OURS


# Workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_small_explained_and_of_core_and_our_nodes(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert workflow["version"] == 0.4
    assert {"last_node_id", "last_link_id", "nodes", "links"} <= set(workflow)
    kinds = [node["type"] for node in workflow["nodes"]]
    assert len(kinds) <= 12
    assert path.with_suffix(".jpg").is_file()
    assert "MarkdownNote" in kinds
    assert set(kinds) - {"MarkdownNote"} <= set(SCHEMA)
    for node in workflow["nodes"]:
        assert {"id", "type", "pos", "size", "flags", "order", "mode", "properties"} <= set(node)
    for link, source, out, target, slot, kind in workflow["links"]:
        nodes = {node["id"]: node for node in workflow["nodes"]}
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_says_what_its_twin_says(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    twin = json.loads((ROOT / "tests/host/api" / path.name).read_text(encoding="utf-8"))
    assert to_api(workflow) == twin


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_s_values_are_within_the_inputs_ranges(path):
    twin = json.loads((ROOT / "tests/host/api" / path.name).read_text(encoding="utf-8"))
    for node in twin.values():
        for name, (kind, *rest) in inputs_of(node["class_type"]).items():
            value, options = node["inputs"].get(name), rest[0] if rest else {}
            if isinstance(value, list):
                continue
            choices = options.get("options") if kind == "COMBO" else kind if isinstance(kind, list) else None
            assert not choices or value in choices or name == "model", name  # the user's own file
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], name


def to_api(workflow: dict) -> dict:
    """What the page sends for a workflow: values by position, one place more behind a seed, notes left out."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] not in SCHEMA:
            continue
        values, inputs = list(node["widgets_values"]), {}
        links = {slot["name"]: slot["link"] for slot in node["inputs"]}
        for name, (kind, *rest) in inputs_of(node["type"]).items():
            if kind in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN") or isinstance(kind, list):
                inputs[name] = values.pop(0)
                if rest and rest[0].get("control_after_generate"):
                    assert values.pop(0) in AFTER_A_SEED
            if links.get(name) is not None:
                inputs[name] = sources[links[name]]
        # loaders of files keep values of the page's own behind, for their buttons
        assert values in ([], ["image"], ["", ""])
        assert not values or node["type"].startswith("Load")
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
