"""The node layer without ComfyUI: conversions, and that texts, help and workflows fit the nodes as ComfyUI shows them.

tests/host/object_info.json is what a real ComfyUI says of the nodes; tests/host proves that it still does.
"""

import gc
import inspect
import json
import re
import sys
import weakref
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image, ImageStat

import lockstep
from lockstep.model.embedded import WEIGHTS
from lockstep.model.engine import Engine, SampleSettings, latent_sha256
from lockstep.model.errors import CheckpointError, MediaError, NotFiniteError, ShapeError, WorkflowError
from lockstep.model.recipes import Recipe, clip_shape, published_recipe
from lockstep.model.shapes import AudioRate, ClipShape, Compression
from lockstep.model.values import AVLatents, Conditioning, Context, Lora, ModelInfo, Progress
from lockstep.nodes import history, types
from lockstep.nodes.refining import refining_levels
from lockstep.nodes.with_loras import WithLoras, add_lora

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "tests/host/object_info.json").read_text(encoding="utf-8"))
OURS = sorted(name for name in SCHEMA if name.startswith("Lockstep"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
LANGUAGES = ("en", "zh", "ja")
CHINESE, KANA = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3041-\u3096\u30a1-\u30fa]")
KEPT_NAMES = {"Lockstep", "Lockstep LoRA", "LoRA", "STG", "json"}
AFTER_A_SEED = ("fixed", "increment", "decrement", "randomize")


HOST_MODULES = (
    *("comfy", "comfy.cli_args", "comfy.model_management", "comfy.model_patcher", "comfy.utils"),
    *(
        "comfy.nested_tensor",
        "comfy_api",
        "comfy_api.latest",
        "comfy_execution",
        "comfy_execution.graph_utils",
    ),
    *("comfy_execution.progress", "comfy_execution.utils", "comfy_execution.validation"),
    *("folder_paths", "protocol", "server"),
)


@pytest.fixture(scope="module")
def pack() -> SimpleNamespace:
    """The modules of nodes as a host has them, where a mock stands for all that they ask of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_MODULES:
            patch.setitem(sys.modules, name, MagicMock())
        sys.modules["comfy_api.latest"].io.ComfyNode = type("ComfyNode", (), {})
        names = (
            "audio_encode",
            "base",
            "extension",
            "host",
            "image_encode",
            "latent_upscale",
            "load_av_latent",
            "loader",
            "lora",
            "sampler",
            "text_encode",
        )
        return SimpleNamespace(**{name: import_module(f"lockstep.nodes.{name}") for name in names})


@pytest.fixture
def host(pack, monkeypatch, tmp_path) -> ModuleType:
    """The pack's dealings with a host whose folders are empty and whose browser is called "page"."""
    folders, server = MagicMock(), MagicMock(client_id="page")
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        getattr(folders, f"get_{kind}_directory").return_value = str(tmp_path / kind)
    folders.get_annotated_filepath.side_effect = lambda name: str(tmp_path / "input" / name)
    folders.get_full_path.return_value = None
    folders.get_filename_list.return_value = ["known.safetensors"]
    monkeypatch.setattr(pack.host, "folder_paths", folders)
    monkeypatch.setattr(pack.host, "PromptServer", SimpleNamespace(instance=server))
    return pack.host


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine("embedded", "cpu")


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


def test_what_asks_nothing_of_a_sampler_is_welcome_in_a_conditioning():
    """As SetTimestepRange over the whole run and LTXVCropGuides leave it."""
    ((context, extras),) = types.to_conditioning(script())
    said = {"start_percent": 0.0, "end_percent": 1.0, "keyframe_idxs": None, "guide_attention_entries": None}
    types.from_conditioning([[context, extras | said]])


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
            "holds end_percent of a node in between",
        ),
        (lambda c: [[c[0][0], c[0][1] | {"control": object()}]], "holds control of a node in between"),
        (lambda c: [[c[0][0], c[0][1] | {"strength": 0.5}]], "holds strength of a node in between"),
        (lambda c: [[c[0][0], c[0][1] | {"ref_audio": {}}]], "holds ref_audio of a node in between"),
        (lambda c: [[c[0][0], c[0][1] | {"frame_rate": 25.0}]], "set fps on Lockstep Sampler"),
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


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((256, 256), (256, 512), False),  # the image was cropped, its mask was not
        ((48, 64), (64, 64), False),
        ((171, 256), (512, 768), True),  # 170.67 rows
        ((171, 256), (4, 6), True),
        ((832, 480), (1920, 1080), False),
        ((832, 480), (1664, 944), True),  # of multiples of 16
        ((1, 1), (1, 2), True),  # of so few pixels nothing can be said
    ],
)
def test_a_mask_of_another_aspect_than_its_picture_is_refused(image, mask, fits):
    drawn = torch.zeros(1, *mask)
    drawn[:, :1, :1] = 1
    if fits:
        assert types.to_picture(torch.rand(1, *image, 3), 0, 1.0, drawn).mask.shape == image
        return
    sizes = f"mask is {mask[1]}x{mask[0]} and image {image[1]}x{image[0]}"
    with pytest.raises(MediaError, match=f"{sizes}.*connect the mask after the same scaling and cropping"):
        types.to_picture(torch.rand(1, *image, 3), 0, 1.0, drawn)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (None, False),
        (torch.zeros(1, 64, 64), False),  # as the host gives it where a picture has no alpha
        (torch.zeros(1, 4, 8), True),
        (torch.full((1, 8, 8), 0.5), True),
        (torch.tensor([[[0.0, 1.0]]]), False),
    ],
)
def test_a_mask_without_white_is_told(pack, host, monkeypatch, mask, told):
    warnings: list[str] = []
    monkeypatch.setattr(host, "warn", lambda _node, said: warnings.extend(said))
    encoder = pack.image_encode.LockstepImageEncode
    node = type("Encode", (encoder,), {"hidden": SimpleNamespace(unique_id="5")})
    node.run(types.to_conditioning(script()), torch.rand(1, 4, 8, 3), 0, 1.0, mask)
    assert warnings == ["mask has nothing white: the whole picture is held"] * told


@pytest.mark.parametrize("mask", [torch.ones(1, 4, 8), torch.ones(2, 4, 8), torch.ones(4, 8)])
def test_a_mask_that_leaves_nothing_or_is_several_is_refused(mask):
    with pytest.raises(MediaError, match="mask"):
        types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, mask)


@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 0, 8), (1, 0, 0)])
def test_a_mask_of_a_picture_that_is_cut_to_nothing_is_refused(shape):
    with pytest.raises(MediaError, match="mask is empty: connect a mask that is not cut to nothing"):
        types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, torch.zeros(shape))


@pytest.mark.parametrize("places", [slice(None), slice(1)])
def test_a_mask_without_numbers_is_refused(places):
    mask = torch.rand(1, 4, 8)
    mask[0, places] = torch.nan
    with pytest.raises(MediaError, match="mask holds values that are no numbers"):
        types.to_picture(torch.rand(1, 4, 8, 3), 0, 1.0, mask)


def test_pictures_that_no_clip_can_hold_are_refused_by_the_node_that_adds_them():
    def held(*pictures: types.Picture) -> list:
        conditioning = types.to_conditioning(script())
        for picture in pictures:
            conditioning = types.with_picture(conditioning, picture)
        return conditioning

    at_5 = types.to_picture(torch.rand(1, 4, 8, 3), 5, 1.0)
    ignored, last = replace(at_5, strength=0.0), replace(at_5, frame=-1)
    held(at_5, ignored, last, replace(at_5, frame=None, attention=0.5))
    for others in ([at_5, last, at_5], [last, last]):
        with pytest.raises(WorkflowError, match=r"two pictures at frame (5|-1): give one of them another"):
            held(*others)
    with pytest.raises(WorkflowError, match="a picture at frame 0 is part of the clip"):
        held(replace(at_5, frame=0, attention=0.5))
    held(replace(at_5, frame=0, attention=0.5, strength=0.0))


def test_frames_count_from_either_end():
    def at(frame: int) -> int:
        return types.frame_of(types.Picture(torch.zeros(2, 2, 3), frame, 1.0), latents().shape)

    assert [at(frame) for frame in (0, 8, -1, -9)] == [0, 8, 8, 0]
    for frame in (9, -10):
        with pytest.raises(ShapeError, match="use 0 to 8"):
            at(frame)


def test_a_picture_stays_at_its_second_when_the_clip_gets_more_frames():
    grown = of_length(17, 24.0)
    (joint,) = types.to_latents(grown, lambda streams: Nested(*streams), 12.0)[2:]
    assert types.counted_fps_of(joint) == 12.0
    video = types.given_streams(joint, None, model())["video"]

    def at(frame: int) -> int:
        picture = types.Picture(torch.zeros(2, 2, 3), frame, 1.0)
        return types.frame_of(picture, video.shape, video.origin.counted_fps)

    assert [at(frame) for frame in (0, 4, 8, -1, -2)] == [0, 8, 16, 16, 14]
    with pytest.raises(ShapeError, match="clip of 9 frames: use 0 to 8"):
        at(9)


def test_upscaled_latents_tell_at_which_rate_pictures_count_their_frames(pack, host, monkeypatch):
    module, engine = pack.latent_upscale, model()
    engine.upscale = lambda *_: of_length(17, 24.0)
    monkeypatch.setattr(host, "find_file", lambda *_: Path("more_frames"))
    monkeypatch.setattr(host, "join_latents", lambda streams: Nested(*streams))
    node = type("Upscale", (module.LockstepLatentUpscale,), {"hidden": SimpleNamespace(unique_id=None)})
    node.run(engine, parts()[2], "more_frames")
    (joint,) = module.io.NodeOutput.call_args.args
    assert (types.counted_fps_of(joint), types.given_streams(joint, None, engine)["video"].shape.fps) == (
        12,
        24,
    )


@pytest.mark.parametrize(
    ("pictures", "sound", "told"),
    [
        (torch.ones(1, 1, 3, 1, 1), torch.ones(1, 1, 19, 1), False),
        (torch.ones(1, 1, 3, 1, 1), torch.zeros(1, 1, 19, 1), False),  # a sound of yours
        (torch.tensor([0.0, 1.0, 1.0]).reshape(1, 1, 3, 1, 1), torch.ones(1, 1, 19, 1), True),
        (torch.ones(1, 1, 3, 1, 1), torch.arange(19.0).reshape(1, 1, 19, 1) / 18, True),
    ],
)
def test_a_mask_that_an_upscaled_latent_does_not_keep_is_told(pack, host, monkeypatch, pictures, sound, told):
    module, engine, warnings = pack.latent_upscale, model(), []
    engine.upscale = lambda *_: of_length(17, 24.0)
    monkeypatch.setattr(host, "find_file", lambda *_: Path("more_frames"))
    monkeypatch.setattr(host, "join_latents", lambda streams: Nested(*streams))
    monkeypatch.setattr(host, "warn", lambda _node, said: warnings.extend(said))
    node = type("Upscale", (module.LockstepLatentUpscale,), {"hidden": SimpleNamespace(unique_id=None)})
    node.run(engine, parts()[2] | {"noise_mask": Nested(pictures, sound)}, "more_frames")
    assert [text.partition(",")[0] for text in warnings] == ["the noise mask is not kept"] * told
    (joint,) = module.io.NodeOutput.call_args.args
    assert types.kept_streams(types.given_streams(joint, None, engine)) == (
        {"audio"} if not sound.any() else set()
    )


def test_presets_of_sizes_are_of_the_published_grid_and_refused_by_a_model_that_is_small(pack):
    sizes = [aspect for aspect in pack.sampler.ASPECTS if "x" in aspect]
    assert {"768x512", "1280x704", "1920x1088"} < set(sizes)
    for size in sizes:
        shape = clip_shape(published_recipe("full", "2.3"), Compression(), AudioRate(), size)
        assert f"{shape.width}x{shape.height}" == size == types.size_of(size, 16, 16)
        with pytest.raises(ShapeError, match="outside what this model was trained on"):
            Engine("embedded", device="cpu").shape(size)


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
        assert (back.shape, back.latent_space) == (made.shape, made.latent_space)
    for source in (audio, joint):
        back = types.from_audio_latent(source)
        assert torch.equal(back.audio, made.audio)
        assert (back.shape, back.latent_space) == (made.shape, made.latent_space)
    for alone in (video, audio):
        with pytest.raises(ShapeError, match="connect an av_latent output"):
            types.from_joint_latent(alone)
    both = types.from_joint_latent(joint)
    assert torch.equal(both.video, made.video)
    assert torch.equal(both.audio, made.audio)


def model(latent_space: str = "tiny/1") -> SimpleNamespace:
    """Stands for an engine with latents such as those above; its own rate is 12."""

    def empty_latents(shape: ClipShape) -> AVLatents:
        grid = (shape.latent_frames, shape.latent_height, shape.latent_width)
        sound = torch.zeros(1, 2, shape.audio_latents, 5)
        return AVLatents(torch.zeros(1, 8, *grid), sound, shape, latent_space)

    return SimpleNamespace(
        model_id="tiny/1",
        latent_space=latent_space,
        shape=shape_of,
        empty_latents=empty_latents,
        recipe=Recipe(),
    )


def join(video: dict, audio: dict) -> dict:
    """As ComfyUI's LTXVConcatAVLatent does."""
    return video | audio | {"samples": Nested(video["samples"], audio["samples"])}


def separate(joint: dict) -> tuple[dict, dict]:
    """As ComfyUI's LTXVSeparateAVLatent does."""
    video, audio = joint["samples"].unbind()
    return joint | {"samples": video}, joint | {"samples": audio}


def of_length(frames: int, fps: float = 12.0, latent_space: str = "tiny/1") -> AVLatents:
    shape = replace(latents().shape, frames=frames, fps=fps)
    return replace(model(latent_space).empty_latents(shape), shape=shape)


def test_joined_streams_keep_what_each_of_them_says():
    video, audio = parts(of_length(9, 24.0, "a"))[0], parts(of_length(9, 12.0, "b"))[1]
    joint = join(video, audio)
    assert types.from_video_latent(joint).shape.fps == 24.0
    assert types.from_video_latent(joint).latent_space == "a"
    assert types.from_audio_latent(joint).latent_space == "b"
    with pytest.raises(
        WorkflowError, match="pictures of a and sound of b: encode the sound with the model of"
    ):
        types.from_joint_latent(joint)


def test_streams_of_two_clips_that_were_taken_apart_keep_what_each_of_them_says():
    (video, _), (_, audio) = separate(parts(of_length(9, 24.0))[2]), separate(parts(of_length(9, 12.0))[2])
    joint = join(video, audio)
    assert types.counted_fps_of(joint) == types.from_video_latent(joint).shape.fps == 24.0
    assert types.from_joint_latent(joint).shape.fps == 24.0
    again, sound = separate(joint)
    assert types.from_video_latent(again).shape.fps == 24.0
    assert types.from_audio_latent(sound).shape.fps == 12.0
    with pytest.raises(WorkflowError, match="latent space other/2"):
        types.given_streams(join(separate(parts(of_length(9, 12.0, "other/2"))[2])[0], audio), None, model())


def test_a_stream_that_was_changed_between_two_clips_keeps_the_facts_of_its_own():
    """As behind a node that makes new samples of those that it is given, and copies what lies beside them."""

    def changed(stream: dict) -> dict:
        return stream | {"samples": stream["samples"] * 1}

    (video, _), (_, audio) = separate(parts(of_length(9, 24.0))[2]), separate(parts(of_length(9, 12.0))[2])
    for joint in (
        join(changed(video), audio),
        join(video, changed(audio)),
        join(*map(changed, (video, audio))),
    ):
        assert types.counted_fps_of(joint) == types.from_video_latent(joint).shape.fps == 24.0
        again, sound = separate(joint)
        assert types.from_video_latent(changed(again)).shape.fps == 24.0
        assert types.from_audio_latent(changed(sound)).shape.fps == 12.0


def test_sound_that_goes_on_into_another_clip_says_the_same_as_before():
    """As a sampler hands on the tensor of a sound that it was given."""
    made = of_length(9, 24.0)
    before = parts(made)[1]
    parts(replace(of_length(9, 12.0), audio=before["samples"]))
    assert types.from_audio_latent(before).shape.fps == 24.0
    unmarked = {"samples": made.audio, "type": "audio"}
    assert types.from_audio_latent(unmarked, model()).shape.fps != 24.0


def test_the_sound_of_a_cut_video_is_cut_to_it():
    video, audio, _ = parts()
    joint = join(video | {"samples": video["samples"][:, :, :2]}, audio)
    whole = types.from_joint_latent(joint)
    assert (whole.shape.frames, whole.audio.shape[2]) == (5, 10)
    assert torch.equal(whole.audio, audio["samples"][:, :, :10])
    heard = types.from_audio_latent(joint)
    assert (heard.shape.seconds, heard.audio.shape[2]) == (5 / 12, 10)


def test_sound_that_is_too_short_for_its_pictures_is_refused_where_rounding_does_not_explain_it():
    video, audio, _ = parts()
    almost = types.from_joint_latent(join(video, audio | {"samples": audio["samples"][:, :, :18]}))
    assert torch.equal(almost.audio[:, :, 18], audio["samples"][:, :, 17])
    for convert in (types.from_joint_latent, types.from_audio_latent):
        with pytest.raises(ShapeError, match=r"has 17 latents, its pictures of 0\.75 s need 19"):
            convert(join(video, audio | {"samples": audio["samples"][:, :, :17]}))


def test_latents_of_other_nodes_are_those_of_the_model_that_they_are_given_to():
    made, engine = latents(), model()
    video = {"samples": made.video, "noise_mask": torch.ones(1, 1, 3, 1, 1)}
    shown = types.from_video_latent(video, engine)
    assert (shown.latent_space, shown.shape) == ("tiny/1", made.shape)
    given = types.given_streams(video, {"samples": made.audio, "type": "audio"}, engine, 24.0)
    assert {stream.shape.fps for stream in given.values()} == {24.0}
    assert given["audio"].shape.frames == 17  # 19 latents, 0.76 s
    both = types.from_joint_latent({"samples": Nested(made.video, made.audio)}, engine)
    assert (both.shape, both.audio.shape[2]) == (made.shape, 19)
    with pytest.raises(ShapeError, match="connect a latent of this model"):
        types.from_video_latent({"samples": torch.zeros(1, 128, 3, 4, 6)}, engine)


def test_a_stream_that_lost_its_facts_has_those_of_the_one_it_is_joined_with():
    made = of_length(9, 24.0)
    audio = parts(made)[1]
    assert types.from_joint_latent(join({"samples": made.video}, audio)).shape == made.shape


@pytest.mark.parametrize("count", [1, 18, 20])
def test_sound_of_other_nodes_decodes_as_long_as_it_is(count):
    heard = types.from_audio_latent({"samples": torch.zeros(1, 2, count, 5), "type": "audio"}, model())
    assert heard.audio.shape[2] == heard.shape.audio_latents == count
    assert heard.shape.samples(16000) == count * 640


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
        (0, {"samples": torch.zeros(2, 8, 3, 4, 6)}, ShapeError, "video holds 2 clips"),
        (0, {"samples": torch.zeros(1, 4, 3, 4, 6)}, ShapeError, "connect a latent of this model"),
        (0, {"samples": torch.zeros(1, 8, 3)}, ShapeError, r"\(1, 8, frames, rows, columns\) is needed"),
        (0, {"noise_mask": torch.ones(5)}, ShapeError, r"noise mask of video has the shape \(5,\), a MASK"),
        (0, {"noise_mask": torch.ones(64, 96)}, ShapeError, "put it on by SetLatentNoiseMask"),
        (1, {"noise_mask": torch.ones(1, 1, 1, 1, 1, 1)}, ShapeError, "noise mask of audio has the shape"),
        (0, {"noise_mask": "all"}, ShapeError, "noise mask of video has the type str"),
        (0, {"samples": torch.zeros(1, 2, 19, 5)}, ShapeError, "video output, not audio"),
        (1, {"samples": torch.zeros(1, 8, 3, 4, 6)}, ShapeError, "audio output, not video"),
        (1, {"samples": torch.zeros(1, 2, 9, 5)}, ShapeError, "the sampler made 19"),
        (1, {"samples": torch.zeros(1, 2, 19, 4)}, ShapeError, "connect a latent of this model"),
        (
            0,
            {"samples": torch.full((1, 8, 3, 4, 6), torch.nan)},
            NotFiniteError,
            "video holds values that are",
        ),
        (1, {"samples": torch.full((1, 2, 19, 5), torch.inf)}, NotFiniteError, "audio holds values that are"),
        (1, {"samples": torch.zeros(1, 2, 0, 5)}, ShapeError, "audio is empty"),
        (0, {"samples": torch.zeros(1, 8, 3, 0, 6)}, ShapeError, "video is empty"),
        (1, {"samples": torch.zeros(1, 2, 0, 0)}, ShapeError, "audio is empty"),  # as LatentCrop leaves it
    ],
)
def test_latents_that_do_not_fit_are_refused(stream, change, error, sentence):
    convert = (types.from_video_latent, types.from_audio_latent)[stream]
    with pytest.raises(error, match=sentence):
        convert(parts()[stream] | change)


def test_a_latent_that_does_not_say_its_model_is_refused_where_none_is_given():
    with pytest.raises(WorkflowError, match="video does not say its model and fps"):
        types.from_video_latent({"samples": torch.zeros(1, 8, 3, 4, 6)})


def test_streams_of_yours_stay_yours_behind_a_sampler():
    made = latents()
    for kept in ({"audio"}, {"video"}, {"video", "audio"}):
        parts_of = types.to_latents(made, lambda streams: Nested(*streams), kept=kept)
        assert types.kept_streams(types.given_streams(parts_of[2], None, model())) == kept
        for name, alone in zip(("video", "audio"), parts_of, strict=False):
            assert ("noise_mask" in alone) == (name in kept)
    assert types.kept_streams(types.given_streams(parts()[2], None, model())) == set()


# Clips that go on


def extended(joint: dict, seconds: float, audio: dict | None = None) -> dict:
    streams = types.given_streams(joint, audio, model())
    return types.to_extended(streams, seconds, model(), lambda both: Nested(*both))


def test_an_extended_clip_keeps_what_it_has_and_leaves_the_rest_free():
    made = latents()
    longer = extended(parts(made)[2], 0.6)
    streams = types.given_streams(longer, None, model())
    video, audio = streams["video"], streams["audio"]
    # 0.75 and 0.6 s are 16 frames, of which the codec holds 17
    assert (video.shape.frames, video.samples.shape[2], audio.samples.shape[2]) == (17, 5, 35)
    assert torch.equal(video.samples[:, :, :3], made.video)
    assert torch.equal(audio.samples[:, :, :19], made.audio)
    assert video.mask[0, 0, :, 1, 1].tolist() == [0] * 3 + [1] * 2
    assert audio.mask[0, 0, :, 0].tolist() == [0] * 19 + [1] * 16


def test_an_extended_clip_is_longer_by_one_latent_at_least():
    streams = types.given_streams(extended(parts()[2], 0.1), None, model())
    assert streams["video"].shape.frames == 13


def test_an_extended_clip_without_sound_gets_all_of_it():
    streams = types.given_streams(extended(types.to_kept_video(latents()), 0.6), None, model())
    assert streams["audio"].mask is None
    assert streams["video"].mask[0, 0, :, 0, 0].tolist() == [0] * 3 + [1] * 2


def test_a_sound_that_reaches_beyond_the_pictures_stays_as_far_as_it_goes():
    sound = types.to_kept_audio(of_length(13))
    streams = types.given_streams(extended(parts()[0], 0.6, sound), None, model())
    kept = of_length(13).audio.shape[2]
    assert streams["audio"].mask[0, 0, :, 0].tolist() == [0] * kept + [1] * (35 - kept)


def test_a_part_that_was_free_stays_free_in_an_extended_clip():
    video = parts()[0] | {"noise_mask": torch.tensor([0.0, 1.0, 0.0]).reshape(1, 1, 3, 1, 1)}
    streams = types.given_streams(extended(video, 0.6), None, model())
    assert streams["video"].mask[0, 0, :, 0, 0].tolist() == [0, 1, 0, 1, 1]


def test_of_an_empty_latent_nothing_goes_on():
    blank = replace(
        latents(), video=torch.zeros_like(latents().video), audio=torch.zeros_like(latents().audio)
    )
    with pytest.raises(ShapeError, match="latent is an empty latent, from which nothing goes on"):
        extended(parts(blank)[2], 1.0)
    silent = parts(replace(latents(), audio=blank.audio))[2]
    assert types.given_streams(extended(silent, 0.6), None, model())["audio"].mask is None
    assert types.given_streams(extended(silent, 0.6), None, model())["video"].mask is not None


def test_the_length_of_a_sound_that_is_made_anyway_does_not_matter(pack):
    streams = types.given_streams(parts()[2], None, model())
    short = replace(streams["audio"], samples=streams["audio"].samples[:, :, :5])
    shape = streams["video"].shape
    assert pack.sampler.kept_parts({"audio": short}, shape) == {}
    for refused in (
        lambda: pack.sampler.kept_parts({"audio": replace(short, mask=torch.zeros(1, 1, 5, 1))}, shape),
        lambda: pack.sampler.latents_to_refine(streams | {"audio": short}, shape),
    ):
        with pytest.raises(ShapeError, match="has 5 latents"):
            refused()


def test_a_joint_latent_inside_another_one_is_refused():
    video, audio, joint = parts()
    for inside in (Nested(joint["samples"], audio["samples"]), Nested(video["samples"], joint["samples"])):
        with pytest.raises(ShapeError, match="put LTXVSeparateAVLatent before LTXVConcatAVLatent"):
            types.given_streams(joint | {"samples": inside}, None, model())


def test_a_latent_of_streams_of_one_kind_or_of_three_is_refused():
    video, audio = latents().video, latents().audio
    for inside, counts in (
        ((video, video), "2 latents together, 2 of video and 0 of sound"),
        ((audio, audio), "2 latents together, 0 of video and 2 of sound"),
        ((video, audio, video), "3 latents together, 2 of video and 1 of sound"),
    ):
        with pytest.raises(
            ShapeError, match=f"^latent holds {counts}: join one of each by LTXVConcatAVLatent"
        ):
            types.given_streams({"samples": Nested(*inside)}, None, model())


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 4, 64, 64), (1, 2, 19, 5)])
def test_an_empty_latent_of_pictures_is_not_taken_as_a_sound(shape):
    """Of some widths its channels and bins are those of a sound."""
    for name, read in (
        ("latent", lambda given: types.given_streams(given, None, model())),
        ("audio", lambda given: types.from_audio_latent(given, model())),
    ):
        told = (
            f"^{name} is an empty latent of single pictures.*: connect Lockstep Empty AV Latent, or nothing$"
        )
        for beside in (
            {},
            parts()[0],
        ):  # alone, or joined by LTXVConcatAVLatent, which puts both dictionaries into one
            streams = [*([beside["samples"]] if beside else []), torch.zeros(shape)]
            given = beside | {"samples": Nested(*streams) if beside else streams[0]}
            with pytest.raises(ShapeError, match=told):
                read(given)
    for sound in (
        {"samples": torch.zeros(1, 2, 19, 5), "type": "audio"},
        {"samples": torch.ones(1, 2, 19, 5)},
    ):
        assert set(types.given_streams(sound, None, model())) == {"audio"}
    video, audio, joint = parts(of_length(9))
    assert set(types.given_streams(audio, None, model())) == {"audio"}
    assert set(types.given_streams(joint, None, model())) == {"video", "audio"}
    marked = {"samples": torch.zeros_like(audio["samples"]), "type": "audio"}
    for sound in (audio, marked):
        given = video | sound | {"samples": Nested(video["samples"], sound["samples"].clone())}
        assert set(types.given_streams(given, None, model())) == {"video", "audio"}


@pytest.mark.parametrize(
    ("stream", "shape"),
    [
        *((0, shape) for shape in [(0, 4, 4), (1, 0, 4, 4), (1, 0, 3, 4, 4), (0, 1, 3, 4, 4), (1, 4, 0)]),
        *((1, shape) for shape in [(0, 4, 4), (1, 0, 19, 5), (1, 2, 0, 5), (1, 1, 0, 4, 4)]),
    ],
)
def test_a_mask_that_is_cut_to_nothing_is_refused(stream, shape):
    with pytest.raises(
        ShapeError, match=r"^the noise mask of latent is empty: connect a mask that is not cut"
    ):
        types.given_streams(parts()[stream] | {"noise_mask": torch.zeros(shape)}, None, model())


@pytest.mark.parametrize("mask", [torch.full((1, 64, 96), torch.nan), torch.full((1, 1, 19, 1), torch.inf)])
def test_a_noise_mask_without_numbers_is_refused(mask):
    given = parts()[0 if mask.ndim == 3 else 1] | {"noise_mask": mask}
    with pytest.raises(NotFiniteError, match="the noise mask of latent holds values that are no numbers"):
        types.given_streams(given, None, model())


def test_a_clip_that_cannot_go_on_is_refused():
    with pytest.raises(ShapeError, match="latent holds sound alone: connect an av_latent output"):
        extended(parts()[1], 1.0)

    def wide(size: str | None, seconds: float | None, fps: float | None) -> ClipShape:
        raise ShapeError("width 96 pixels is outside of 16 to 64")

    streams = types.given_streams(parts()[2], None, model())
    limited = SimpleNamespace(**vars(model()) | {"shape": wide})
    with pytest.raises(ShapeError, match=r"^latent cannot go on: width 96"):
        types.to_extended(streams, 9.0, limited, lambda both: Nested(*both))


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (4.2, "use up to 3.4 for seconds, or encode the clip's last pictures"),
        (0.9, "s: encode the clip's last"),
    ],
)
def test_a_clip_that_would_get_too_long_is_told_by_how_much_it_may_grow(limit, advice):
    """It lasts 0.75 s, and a latent 0.33 s."""
    streams = types.given_streams(parts()[2], None, model())
    limited = SimpleNamespace(**vars(model()) | {"recipe": Recipe(seconds_limits=(0.5, limit))})
    with pytest.raises(ShapeError, match=r"latent lasts 0\.75 s, with 9 s more it would be 9\.75 s") as told:
        types.to_extended(streams, 9.0, limited, lambda both: Nested(*both))
    assert advice in str(told.value)
    if "up to" in advice.partition("for")[0]:
        types.to_extended(streams, 3.4, limited, lambda both: Nested(*both))


# What the sampler is given


def test_a_latent_without_a_mask_sets_the_size_alone():
    streams = types.given_streams(parts()[2], None, model())
    assert {name: stream.mask for name, stream in streams.items()} == {"video": None, "audio": None}
    assert streams["video"].shape == latents().shape
    assert types.given_streams(None, None, model()) == {}


def test_encoded_clips_stay_as_they_are():
    made = latents()
    streams = types.given_streams(types.to_kept_video(made), types.to_kept_audio(made), model())
    assert torch.equal(streams["video"].samples, made.video)
    assert torch.equal(streams["audio"].samples, made.audio)
    assert streams["video"].mask.shape == (1, 1, 3, 4, 6)
    assert streams["audio"].mask.shape == (1, 1, 19, 1)
    assert not streams["video"].mask.any()
    assert not streams["audio"].mask.any()


def test_masks_of_every_layout_fit_the_latents():
    def mask_of(noise_mask: torch.Tensor) -> torch.Tensor | None:
        return types.given_streams(parts()[0] | {"noise_mask": noise_mask}, None, model())["video"].mask

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
    streams = types.given_streams(joint, None, model())
    assert streams["video"].mask is None
    assert streams["audio"].mask[0, 0, :, 0].tolist() == [0] * 10 + [1] * 9
    alone = types.given_streams(parts()[2] | {"noise_mask": torch.zeros(1, 1, 8, 8)}, None, model())
    assert alone["audio"].mask is None
    assert not alone["video"].mask.any()


def test_a_stream_alone_has_of_the_masks_of_a_joint_latent_its_own():
    """As a node may leave them that takes the streams apart and not their masks."""
    sound = torch.zeros(1, 1, 19, 1)
    sound[:, :, 10:] = 1
    pictures = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 1, 3, 1, 1)
    video, audio = separate(parts()[2] | {"noise_mask": Nested(pictures, sound)})
    heard = types.given_streams(audio, None, model())["audio"].mask
    assert heard[0, 0, :, 0].tolist() == [0] * 10 + [1] * 9
    assert types.given_streams(video, None, model())["video"].mask[0, 0, :, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("form", [(10, 8, 6), (10, 1, 8, 6), (1, 1, 10, 8, 6)])
def test_of_a_batch_of_masks_on_a_sound_each_stands_for_its_time(form):
    masks = torch.zeros(10, 8, 6)
    masks[5:, 3, 2] = 1  # one white pixel frees its time
    masks[4, 7, 5] = 0.5
    mask = types.given_streams(parts()[1] | {"noise_mask": masks.reshape(form)}, None, model())["audio"].mask
    assert mask.shape == (1, 1, 19, 1)
    assert mask[0, 0, :, 0].tolist() == [0] * 7 + [0.5] * 2 + [1] * 10


@pytest.mark.parametrize("form", [(1, 19, 4), (1, 1, 19, 4), (1, 1, 1, 19, 4)])
def test_time_runs_down_the_rows_of_a_single_mask_on_a_sound(form):
    rows = torch.zeros(19, 4)
    rows[12:, 1] = 1
    mask = types.given_streams(parts()[1] | {"noise_mask": rows.reshape(form)}, None, model())["audio"].mask
    assert mask[0, 0, :, 0].tolist() == [0] * 12 + [1] * 7


def test_a_joint_mask_for_the_pictures_alone_leaves_the_sound_free():
    given = parts()[2] | {
        "noise_mask": SimpleNamespace(is_nested=True, unbind=lambda: [torch.zeros(1, 1, 3, 1, 1)])
    }
    streams = types.given_streams(given, None, model())
    assert streams["video"].mask is not None
    assert streams["audio"].mask is None


def test_a_mask_with_the_channels_of_its_latent_is_read():
    """As ComfyUI's LTXVConcatAVLatent makes for the stream that has none."""
    sound = torch.ones(1, 2, 19, 5)
    sound[:, :, :7] = 0
    joint = parts()[2] | {"noise_mask": Nested(torch.zeros(1, 8, 3, 4, 6), sound)}
    streams = types.given_streams(joint, None, model())
    assert not streams["video"].mask.any()
    assert streams["audio"].mask[0, 0, :, 0].tolist() == [0] * 7 + [1] * 12


def test_given_latents_that_do_not_fit_are_refused():
    video, audio, joint = parts()
    with pytest.raises(
        WorkflowError, match=r"^audio_latent is of the latent space tiny/1, the sampler's is other/2"
    ):
        types.given_streams(None, audio, model("other/2"))
    with pytest.raises(
        WorkflowError, match=r"^latent is of the latent space tiny/1, the sampler's is other/2"
    ):
        types.given_streams(joint, None, model("other/2"))
    with pytest.raises(ShapeError, match="audio_latent holds a video and no sound"):
        types.given_streams(None, video, model())


def test_a_given_sound_is_cut_to_the_clip_and_may_not_be_shorter():
    sound = types.given_streams(None, types.to_kept_audio(latents()), model())["audio"]
    shorter = types.replace(latents().shape, frames=5)
    cut = types.fit_sound_to(sound, shorter)
    assert cut.samples.shape[2] == cut.mask.shape[2] == shorter.audio_latents < 19
    with pytest.raises(ShapeError, match=r"of audio_latent has 19 latents, a clip of 1\.08333 s needs 27"):
        types.fit_sound_to(sound, types.replace(latents().shape, frames=13))
    joint = types.given_streams(parts()[2], None, model())["audio"]
    with pytest.raises(ShapeError, match="the sound of latent has 19 latents"):
        types.fit_sound_to(joint, types.replace(latents().shape, frames=13))


@pytest.mark.parametrize("fps", range(12, 25))
def test_the_sampler_takes_every_sound_that_the_encoder_made_for_it(pack, host, monkeypatch, embedded, fps):
    monkeypatch.setattr(embedded, "encode_sound", lambda *given: embedded.empty_latents(given[2]).audio + 1)
    encoder, sampler = pack.audio_encode, pack.sampler
    node = type("Encode", (encoder.LockstepAudioEncode,), {"hidden": SimpleNamespace(unique_id=None)})
    for seconds in (1.0, 1.5, 2.0, 4.0, 4.2):
        node.run(embedded, {"waveform": torch.zeros(1, 1, 9), "sample_rate": 8000}, seconds, float(fps))
        (latent,) = encoder.io.NodeOutput.call_args.args
        given = types.given_streams(latent, None, embedded)
        shape = sampler.shape_of(given, partial(embedded.shape, None), 0.0, 0.0)
        assert 1 <= shape.seconds <= 4.2
        assert embedded.recipe.untrained(shape) == ()
        kept = sampler.kept_parts(given, shape)
        assert kept["given_audio"].shape[2] == shape.audio_latents


@pytest.mark.parametrize(("count", "fps"), [(105, 24.0), (25, 14.0), (250, 12.0)])
def test_a_sound_of_another_node_is_taken_at_its_length(pack, embedded, count, fps):
    """As that of a video, its length is told where the model was not trained on it."""
    given = types.given_streams(None, {"samples": torch.ones(1, 4, count, 16)}, embedded, fps)
    shape = pack.sampler.shape_of(given, partial(embedded.shape, None), 0.0, 0.0)
    assert shape.audio_latents <= count
    assert (embedded.recipe.untrained(shape) == ()) == (count == 105)


def test_steps_that_a_trajectory_cannot_show_are_refused_before_sampling(pack, host, monkeypatch, embedded):
    monkeypatch.setattr(host, "is_watched", lambda: False)
    monkeypatch.setattr(embedded, "sample", MagicMock(side_effect=AssertionError("sampled")))
    node = type("Sampler", (pack.sampler.LockstepSampler,), {"hidden": SimpleNamespace(unique_id=None)})
    text = types.to_conditioning(types.Script(embedded.encode_text("a red ball")))
    own = (types.OWN_ASPECT, 0, 0, 0.0, 0.0, 3, 0.0, 0.0)
    # of res2s the last of its steps is one more
    for sampler, steps in (("euler", 3), ("res2s", 4)):
        with pytest.raises(WorkflowError, match=f"trajectory: step 5 is none of the {steps} steps"):
            node.run(embedded, text, *own, sampler, 7, trajectory="1, 5")
    with pytest.raises(AssertionError, match="sampled"):
        node.run(embedded, text, *own, "res2s", 7, trajectory="1, 4")


# Inputs


def socket(kind: str, name: str = "x", optional: bool = False, **limits: float) -> SimpleNamespace:
    """An input as ComfyUI describes it."""
    return SimpleNamespace(id=name, optional=optional, get_io_type=lambda: kind, **limits)


@pytest.mark.parametrize(
    ("asked", "given", "sentence"),
    [
        (socket("COMBO"), None, "x holds nothing: text or a choice"),
        (socket("COMBO", optional=True), None, "x holds nothing: text or a choice"),
        (socket("COMBO"), 5, "x holds 5: text or a choice"),
        (socket("STRING"), ["a"], "x holds ['a']: text or a choice"),
        (socket("INT", min=0, max=9), 10, "x holds 10: a whole number from 0 to 9 is needed"),
        (socket("INT", min=0, max=9), 2.5, "x holds 2.5: a whole number from 0 to 9 is needed"),
        (socket("FLOAT", min=0.0, max=1.0), float("nan"), "x holds nan: a number from 0.0 to 1.0 is needed"),
        (socket("FLOAT", optional=True, min=0.0, max=1.0), None, "x holds nothing: a number from 0.0 to 1.0"),
        (socket("FLOAT", min=0.0, max=1.0), "0.5", "x holds '0.5': a number from 0.0 to 1.0"),
        (
            socket("CONDITIONING"),
            [1],
            "x holds [1], CONDITIONING is needed: connect the conditioning output of Lockstep Text Encode",
        ),
        (
            socket("CONDITIONING"),
            [[torch.zeros(1), 2]],
            "CONDITIONING is needed: connect the conditioning output of",
        ),
        (
            socket("LATENT"),
            {"samples": 5},
            "x holds {'samples': 5}, LATENT is needed: connect a latent, such as",
        ),
        (
            socket("LATENT"),
            {"samples": torch.zeros(1).numpy()},
            "x holds {'samples': array([0.], dtype=float32)}",
        ),
        (socket("LATENT"), None, "x holds nothing, LATENT is needed: connect a latent, such as"),
        (
            socket("IMAGE"),
            {"a": torch.zeros(2, 1)},
            "x holds {'a': tensor([[0.], [0.]])}, IMAGE is needed: connect the images",
        ),
        (socket("STRING"), 10**200, f"x holds 1{'0' * 56}...: text or a choice"),
    ],
)
def test_an_input_that_holds_what_it_cannot_take_is_named(pack, asked, given, sentence):
    with pytest.raises(WorkflowError) as error:
        pack.base.check_inputs([asked], {"x": given})
    assert sentence in str(error.value)


def test_inputs_that_hold_what_they_are_for_pass(pack):
    sockets = [
        socket("COMBO", "choice"),
        socket("INT", "seed", min=0, max=2**64 - 1),
        socket("FLOAT", "whole", min=0.0, max=120.0),
        socket("FLOAT", "left_out", optional=True, min=0.0, max=1.0),
        socket("LATENT", "unconnected", optional=True),
        socket("CONDITIONING", "text"),
    ]
    values = {"choice": "a", "seed": 2**64 - 1, "whole": 24, "unconnected": None}
    pack.base.check_inputs(sockets, values | {"text": types.to_conditioning(script())})


def test_numbers_of_numpy_become_python_s_own(pack):
    class Given(pack.base.Node):
        SCHEMA = SimpleNamespace(
            node_id="Given",
            inputs=[
                socket("INT", "seed", min=0, max=9),
                socket("FLOAT", "fps", min=0.0, max=120.0),
                socket("STRING", "name"),
            ],
        )
        run = staticmethod(lambda **inputs: inputs)

    # scalars of an array, as other packs calculate them
    seed, fps = torch.tensor([7]).numpy()[0], torch.tensor([1.5]).numpy()[0]
    given = Given.execute(seed=seed, fps=fps, name="a")
    assert given == {"seed": 7, "fps": 1.5, "name": "a"}
    assert [type(value) for value in given.values()] == [int, float, str]


@pytest.mark.parametrize("moment", [float("nan"), 1.5, -0.1])
def test_a_moment_outside_the_clip_is_refused_before_sampling(pack, moment):
    limits = inputs_of("LockstepSampler")["trajectory_moment"][1]
    asked = socket("FLOAT", "trajectory_moment", min=limits["min"], max=limits["max"])
    with pytest.raises(WorkflowError, match="trajectory_moment holds"):
        pack.base.check_inputs([asked], {"trajectory_moment": moment})


def test_linked_choices_are_checked_as_constants_are(pack):
    class Choosing(pack.base.Node):
        SCHEMA = SimpleNamespace(
            node_id="Choosing", inputs=[socket("COMBO", "aspect"), socket("COMBO", "free")]
        )

        @classmethod
        def validate_inputs(cls, aspect: str | None = None) -> bool | str:
            return pack.base.check_choices(("aspect", aspect, ("1:1", "4:3")))

        @classmethod
        def run(cls, **inputs: str) -> dict:
            return inputs

    assert Choosing.execute(aspect="4:3", free="any") == {"aspect": "4:3", "free": "any"}
    with pytest.raises(WorkflowError, match="unknown aspect '5:1': use 1:1 or 4:3"):
        Choosing.execute(aspect="5:1", free="any")


@pytest.mark.parametrize(
    ("asked", "linked", "said"),
    [
        (
            "LOCKSTEP_MODEL",
            "MODEL",
            "x is linked to MODEL, LOCKSTEP_MODEL is needed: connect the model output of",
        ),
        (
            "CONDITIONING",
            "LATENT",
            "CONDITIONING is needed: connect the conditioning output of Lockstep Text",
        ),
        ("INT", "MODEL", "INT is needed: type a value into the node or connect an output of type INT"),
        ("INT", ["a", "b"], "x is linked to COMBO, INT is needed"),
        ("INT", "INT", True),
    ],
)
def test_a_link_of_another_type_is_refused_with_the_node_that_gives_it(
    pack, monkeypatch, asked, linked, said
):
    monkeypatch.setattr(pack.host, "fits", lambda received, needed: received == needed)
    node = type("Node", (pack.base.Node,), {"SCHEMA": SimpleNamespace(inputs=[socket(asked)])})
    answer = node.validate_inputs({"x": linked, "of another node": "MODEL"})
    assert answer is True if said is True else said in answer
    assert node.validate_inputs({}) is node.validate_inputs() is True


def test_all_that_is_wrong_is_told_at_once_links_first(pack, host, monkeypatch):
    monkeypatch.setattr(host, "fits", lambda *_: False)
    linked = "x is linked to IMAGE, LATENT is needed: "
    for kind, wrong, said in (
        (pack.loader.LockstepLoader, {"model": 5, "device": "tpu"}, ("unknown device 'tpu'", "model holds 5: ")),
        (pack.load_av_latent.LockstepLoadAVLatent, {"file": {}}, ("file holds {}: ",)),
        (pack.text_encode.LockstepTextEncode, {"prompt": " "}, ("prompt is empty: ",)),
        (pack.sampler.LockstepSampler, {"aspect": "5:1", "sampler": "x"}, ("unknown aspect ", "unknown sampler ")),
    ):  # fmt: skip
        sockets = [socket("LATENT"), socket("LATENT", "y")]
        other = type("Other", (kind,), {"SCHEMA": SimpleNamespace(inputs=sockets)})
        answer = other.validate_inputs(input_types={"x": "IMAGE", "y": "MASK"}, **wrong)
        places = [
            answer.index(begin) for begin in (linked, "; y is linked to MASK, ", *("; " + s for s in said))
        ]
        assert places[0] == 0
        assert places == sorted(places)


def test_every_node_looks_at_its_links_itself(pack, monkeypatch):
    """The host looks for the argument's name, and leaves the types of all links to a node that has it."""
    monkeypatch.setattr(pack.host, "fits", lambda *_: False)
    extension = vars(pack.extension).values()
    nodes = [kind for kind in extension if isinstance(kind, type) and issubclass(kind, pack.base.Node)]
    assert sorted(node.__name__ for node in nodes) == OURS
    for node in nodes:
        assert "input_types" in inspect.getfullargspec(node.validate_inputs).args
        other = type("Other", (node,), {"SCHEMA": SimpleNamespace(inputs=[socket("LATENT")])})
        assert other.validate_inputs(input_types={"x": "IMAGE"}).startswith("x is linked to IMAGE, LATENT is")


def test_constants_of_another_type_are_refused_before_the_run(pack, host):
    assert pack.loader.LockstepLoader.validate_inputs(model=5).startswith("model holds 5: ")
    assert pack.lora.LockstepLoRA.validate_inputs(lora=[5]).startswith("lora holds [5]: ")
    assert pack.load_av_latent.LockstepLoadAVLatent.validate_inputs(file={}).startswith("file holds {}: ")
    assert pack.text_encode.LockstepTextEncode.validate_inputs(prompt=[5]).startswith("prompt holds [5]: ")
    assert pack.base.check_prefix(["a"]).startswith("filename_prefix holds ['a']: ")
    assert pack.lora.LockstepLoRA.validate_inputs(lora=None) is True  # linked
    assert pack.base.check_prefix(None) is True


@pytest.mark.parametrize("name", ["a\0b", "a" * 100_000])
def test_names_that_no_file_can_have_are_refused_in_a_short_sentence(pack, host, name):
    for said in (
        pack.load_av_latent.LockstepLoadAVLatent.validate_inputs(file=name),
        pack.lora.LockstepLoRA.validate_inputs(lora=name),
        pack.loader.LockstepLoader.validate_inputs(model=name),
    ):
        assert said.startswith("no ")
        assert len(said) < 250
    assert "holds a character that names no file" in pack.base.check_prefix("a\0b")


def test_a_model_is_opened_once_for_all_checks_of_graphs_until_its_file_changes(
    pack, host, monkeypatch, tmp_path
):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS.read_bytes())
    host.folder_paths.get_full_path.return_value = str(path)
    opened = MagicMock(side_effect=host.Engine)
    monkeypatch.setattr(host, "Engine", opened)
    check = pack.loader.LockstepLoader.validate_inputs
    assert [check(model="model.safetensors") for _ in range(3)] == [True] * 3
    assert opened.call_count == 1
    path.write_bytes(path.read_bytes()[:-1])
    assert ["fetch it again" in check(model="model.safetensors") for _ in range(2)] == [True] * 2
    path.write_bytes(WEIGHTS.read_bytes())
    assert check(model="model.safetensors") is True
    assert opened.call_count == 4  # a wrong one each time, and the right one anew


def test_a_lora_is_another_once_its_alpha_is_put_beside_it(pack, host, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"")
    host.folder_paths.get_filename_list.return_value = [path.name]
    host.folder_paths.get_full_path.return_value = str(path)

    def fingerprint() -> tuple:
        return pack.lora.LockstepLoRA.fingerprint_inputs(None, path.name, 1.0)

    before = fingerprint()
    assert fingerprint() == before
    assert str(tmp_path) not in str(before)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert fingerprint() != before


def test_an_input_of_a_newer_version_is_named(pack):
    with pytest.raises(
        WorkflowError, match="has no input 'sampler_name': take it out of the graph, use sampler or"
    ):
        pack.base.check_known(["seed", "sampler"], {"seed": 1, "sampler_name": "euler"})
    pack.base.check_known(["seed", "sampler"], {"seed": 1})


def test_a_constant_that_the_host_does_not_hand_on_is_told(pack, host, monkeypatch):
    class Doubled(pack.base.Node):
        SCHEMA = SimpleNamespace(node_id="Doubled", inputs=[socket("INT", "count", min=0, max=9)])
        run = staticmethod(lambda count: 2 * count)

    told, inputs = [], {"count": 4, "counts": 5}
    monkeypatch.setattr(host, "warn", lambda node, said: told.append((node, said)))
    monkeypatch.setattr(host, "running_node", lambda _kind: ("7", inputs))
    assert Doubled.execute(count=4) == 8
    inputs.pop("counts")
    assert Doubled.execute(count=4) == 8
    sentence = "this version of the node has no input 'counts', it counts for nothing: if it is meant, use count or update the pack"
    assert told == [("7", (sentence,)), ("7", ())]


def test_a_node_that_another_node_runs_has_no_inputs_of_that_one(host, monkeypatch):
    node = {"class_type": "LockstepSampler", "inputs": {"seed": 3}}
    monkeypatch.setattr(host, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    monkeypatch.setattr(
        host,
        "get_progress_state",
        lambda: SimpleNamespace(dynprompt=SimpleNamespace(get_node=lambda _id: node)),
    )
    assert host.running_node("LockstepSampler") == ("7", {"seed": 3})
    assert host.running_node("LockstepLoader") == (None, {})
    monkeypatch.setattr(host, "get_executing_context", lambda: None)
    assert host.running_node("LockstepSampler") == (None, {})


def test_folders_of_latents_are_looked_through_once_in_a_few_seconds(host, monkeypatch, tmp_path):
    now = 100.0
    monkeypatch.setattr(host, "time", SimpleNamespace(monotonic=lambda: now))
    (tmp_path / "input" / "b.latent").touch()
    (tmp_path / "output" / "clips").mkdir()
    (tmp_path / "output" / "clips" / "a.latent").touch()
    (tmp_path / "output" / "folder.latent").mkdir()
    known = ["b.latent", "clips/a.latent [output]"]
    assert host.latent_choices() == known
    (tmp_path / "input" / "c.latent").touch()
    assert host.latent_choices() == known
    now += 4
    assert host.latent_choices() == ["b.latent", "c.latent", "clips/a.latent [output]"]


def test_latents_that_lie_behind_links_are_listed_and_loaded(host, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.latent").touch()
    (tmp_path / "input" / "one.latent").symlink_to(elsewhere / "a.latent")
    (tmp_path / "input" / "all").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "input")
    assert host.latent_choices()[:2] == ["all/a.latent", "one.latent"]
    for name in ("all/a.latent", "one.latent"):
        assert host.latent_path(name) == tmp_path / "input" / name
    with pytest.raises(MediaError, match="no latent file"):
        host.latent_path("../elsewhere/a.latent")


def test_a_saved_latent_s_name_may_hold_its_size(pack, host):
    host.folder_paths.get_save_image_path.return_value = ("out", "64x96", 7, "", "")
    path, _ = host.new_output_path("%width%x%height%", ".latent", 96, 64)
    assert path == Path("out/64x96_00007_.latent")
    host.folder_paths.get_save_image_path.assert_called_with(
        "%width%x%height%", host.folder_paths.get_output_directory(), 96, 64
    )


def test_a_prefix_that_ends_in_a_folder_overwrites_nothing(pack, host, tmp_path):
    asked = host.folder_paths.get_save_image_path
    asked.side_effect = lambda prefix, *_: (str(tmp_path), Path(prefix).name, 1, "", prefix)
    for number in (1, 2, 3):
        path, _ = host.new_output_path("clips/", ".mp4")
        assert path == tmp_path / f"clips_{number:05}_.mp4"
        path.touch()
    with pytest.raises(MediaError, match="cannot take files of filename_prefix"):
        host.new_output_path("x" * 300, ".mp4")
    assert pack.base.check_prefix("./") == pack.base.check_prefix("a/..") != True  # noqa: E712


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("../clip", "'../clip' lies outside the output folder"),
        ("clips/../../clip", "lies outside the output folder"),
        ("/etc/clip", "lies outside the output folder"),
        ("x" * 300, "is longer than a file's name may be"),
        ("x/" * 1500 + "y", "is longer than a file's name may be"),
        ("%date%/" + "x/" * 1500 + "y", "is longer than a file's name may be"),
        (f"{'日' * 90}/clip", "is longer than a file's name may be"),
        ("\ud800", "holds a character that names no file"),
    ],
)
def test_a_place_where_nothing_can_be_saved_is_refused_before_the_run(pack, host, prefix, sentence):
    said = pack.base.check_prefix(prefix)
    assert sentence in said
    assert said.endswith(": use a name such as 'lockstep/clip'")


@pytest.mark.parametrize(
    "prefix",
    ["clip", "clips/../clip", "日" * 80, "%date%" + "x" * 300, "a/b/c", "..clip/x", "x/" * 300 + "y"],
)
def test_a_place_where_something_can_be_saved_is_taken(pack, host, prefix):
    assert pack.base.check_prefix(prefix) is True


@pytest.mark.parametrize("extra", ["abc", ["a"], 5, None])
def test_what_came_with_a_graph_and_is_no_mapping_holds_no_workflow(host, monkeypatch, extra):
    told = SimpleNamespace(args=SimpleNamespace(disable_metadata=False))
    monkeypatch.setattr(host, "comfy", SimpleNamespace(cli_args=told))
    graph = {"1": {"class_type": "A", "is_changed": [0.5]}}
    assert host.provenance(graph, extra) == {"prompt": '{"1": {"class_type": "A"}}'}
    assert host.provenance(graph, {"workflow": {"id": 1}})["workflow"] == '{"id": 1}'


# What a node shows


def test_a_line_of_text_goes_to_the_page_that_asked_and_to_the_node_that_it_sees(host, monkeypatch):
    unfolded = MagicMock()
    unfolded.return_value.dynprompt.get_display_node_id.side_effect = {"3.0.1": "3"}.get
    monkeypatch.setattr(host, "get_progress_state", unfolded)
    host.tell("3.0.1", "half done")
    send = host.PromptServer.instance.send_progress_text
    send.assert_called_once_with("half done", "3", sid="page")
    host.PromptServer.instance.client_id = None
    host.tell("3.0.1", "done")
    assert send.call_count == 1


def test_previews_are_made_where_someone_looks_and_the_model_can(pack, host):
    seen = pack.sampler.preview_of(
        SimpleNamespace(prepare_preview=lambda: None, preview=max), latents().shape
    )
    assert seen is not None
    lacking = MagicMock()
    lacking.prepare_preview.side_effect = CheckpointError("no encoder")
    assert pack.sampler.preview_of(lacking, latents().shape) is None
    host.PromptServer.instance.client_id = None
    unseen = MagicMock()
    assert pack.sampler.preview_of(unseen, latents().shape) is None
    assert not unseen.prepare_preview.called


def test_what_cannot_be_shown_yet_does_not_end_the_run(host):
    def look(_: torch.Tensor) -> torch.Tensor:
        raise NotFiniteError("decoded pictures hold 3 values that are no numbers")

    report = host.Reporter(None, "sampling")
    report.look = look
    tick = Progress("sample", 1, 2, preview=torch.zeros(1, 2, 3))
    report(tick)
    assert report.look is None
    report(tick)
    report.look = MagicMock(side_effect=KeyError("a bug"))
    with pytest.raises(KeyError):
        report(tick)


def test_a_module_that_the_engine_forgets_is_held_by_nobody(host, monkeypatch):
    def patcher(module: torch.nn.Module, *_: object) -> SimpleNamespace:
        return SimpleNamespace(model=module)

    monkeypatch.setattr(host.comfy.model_patcher, "ModelPatcher", patcher)
    monkeypatch.setattr(host, "_Streamed", type("Streamed", (), {}))
    monkeypatch.setattr(host, "memory", SimpleNamespace(load_models_gpu=lambda *_, **__: None))
    module, placement = torch.nn.Linear(2, 2), host._Placement(torch.device("cpu"), "auto")
    alive = weakref.ref(module)
    placement(module, 0)
    placement.forget(module)
    placement.forget(module)  # one that never came is none of its business
    del module
    gc.collect()
    assert alive() is None


def test_what_a_run_is_about_to_need_is_told_before_it(host, monkeypatch):
    told = []
    monkeypatch.setattr(host, "tell", lambda *line: told.append(line))
    monkeypatch.setattr(host.memory, "get_total_memory", lambda _: 24 * 2**30)
    host.Reporter("3", "sampling")(Progress("memory", 0, 1, note="memory: sample needs 4.10 GB"))
    assert told == [("3", "memory: sample needs 4.10 GB; the device has 24.00 GB")]


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


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (1, "images: 1 frames at 12 fps are no clip of this model: use 13$"),
        (12, r"images: frames must be 4k.1, got 12: use 13$"),
        (14, r"images: frames must be 4k.1, got 14: use 13 or 17 \(ImageFromBatch"),
        (51, r"images: frames must be 4k.1, got 51: use 49 \(ImageFromBatch"),
        (53, r"images: 53 frames at 12 fps are no clip of this model: use 49 \(ImageFromBatch"),
    ],
)
def test_counts_of_frames_that_are_offered_are_within_the_model_s_limits(frames, sentence):
    shape_of = partial(
        clip_shape, Recipe(fps=12.0, frames=25, seconds_limits=(1.0, 4.2)), Compression(4, 16), AudioRate()
    )
    with pytest.raises(ShapeError, match=sentence):
        types.to_pixels(torch.zeros(frames, 32, 48, 3), 0.0, shape_of)


def test_pictures_and_sounds_without_numbers_are_refused_by_their_input_s_name():
    frames = torch.zeros(9, 32, 48, 3)
    frames[4, 3, 3, 0] = torch.nan
    sound = {"waveform": torch.full((1, 1, 9), torch.inf), "sample_rate": 8000}
    for refused, sentence in (
        (lambda: types.to_pixels(frames, 0.0, shape_of), "images hold values that are no numbers"),
        (lambda: types.to_encodable(types.to_clip(frames, 12.0, None)), "images hold values that are no"),
        (lambda: types.to_encodable(types.to_clip(frames[:4], 12.0, sound)), "audio holds values that are no"),
        (lambda: types.to_encodable(types.to_clip(frames[:4, :31, 1:], 12.0, None)),
         "images are 47x31, H.264 needs even sizes: bring them to 46x30 by ImageScale or ImageCrop"),
    ):  # fmt: skip
        with pytest.raises(MediaError, match=sentence):
            refused()


def test_pictures_of_infinite_values_are_refused_before_they_are_cut_to_their_range():
    frames = torch.zeros(9, 32, 48, 3)
    frames[4, 3, 3, 0] = torch.inf
    with pytest.raises(MediaError, match="images hold values that are no numbers"):
        types.to_pixels(frames, 0.0, shape_of)
    with pytest.raises(MediaError, match="image holds values that are no numbers"):
        types.to_picture(frames[4:5], 0, 1.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.complex64])
def test_pictures_and_sounds_whose_values_are_no_fractions_are_refused(dtype):
    """Of 8 bits all but black would be white."""
    frames, sound = torch.ones(9, 32, 48, 3).to(dtype), torch.ones(1, 2, 5).to(dtype)
    for refused in (
        lambda: types.to_pixels(frames, 0.0, shape_of),
        lambda: types.to_clip(frames, 12.0, None),
        lambda: types.to_picture(frames[:1], 0, 1.0),
    ):
        with pytest.raises(MediaError, match=f"holds {dtype} values, float ones from 0 to 1 are needed"):
            refused()
    with pytest.raises(MediaError, match=f"audio holds {dtype} samples, float ones from -1 to 1 are needed"):
        types.from_audio({"waveform": sound, "sample_rate": 16000})


def test_nodes_that_change_pictures_are_not_named_where_their_rate_is_refused():
    def refusing(_size, _seconds, fps) -> ClipShape:
        raise ShapeError(f"fps {fps:g} is too many: use 24")

    with pytest.raises(ShapeError, match=r"^fps 30 is too many: use 24$"):
        types.to_pixels(torch.zeros(9, 32, 48, 3), 30.0, refusing)


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


@pytest.mark.parametrize(
    ("audio", "sentence"),
    [
        ({"waveform": torch.zeros(1, 2, 0), "sample_rate": 8000}, "audio is empty, it has no samples"),
        ({"waveform": [0.0], "sample_rate": 8000}, "audio holds a list as its waveform"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}, "how many samples per second"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": "fast"}, "how many samples per second"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": float("nan")}, "how many samples per second"),
        ({"waveform": torch.zeros(1, 1, 9)}, "how many samples per second"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 10**5000}, "how many samples per second"),
        (
            {"waveform": torch.zeros(1, 1, 9), "sample_rate": 2},
            "says 2 samples per second, 1000 to 768000 are",
        ),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 2**31}, "says 2.147.* 1000 to 768000 are needed"),
    ],
)
def test_a_sound_of_another_form_is_told_as_what_it_is(audio, sentence):
    for convert in (types.from_audio, lambda sound: types.to_clip(torch.zeros(1, 4, 6, 3), 12.0, sound)):
        with pytest.raises(MediaError, match=sentence):
            convert(audio)


@pytest.mark.parametrize(
    ("channels", "rate_hz", "held"),
    [
        (1, 16000, (1, 16000)),
        (2, 48000, (2, 48000)),
        (6, 44100, (2, 44100)),
        (2, 192000, (2, 96000)),
        (1, 1000, (1, 8000)),
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

    def add_frames(self, _conditioning, _start, _guides, settings, seed, **_named):
        self.seen.append(("add frames", seed, settings.loras))

    def steps(self, settings, _shape):
        self.seen.append(("steps", settings.loras))

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
    both.add_frames(None, None, [], SampleSettings(), 8)
    both.steps(SampleSettings(), None)
    loras = (first, second)
    assert engine.seen[:2] == [("text", ("a red ball", ""), loras), ("sample", 7, loras)]
    assert engine.seen[2:] == [("add frames", 8, loras), ("steps", loras)]


def test_no_method_that_takes_settings_or_loras_passes_a_model_s_loras_by():
    asking = {
        name
        for name, method in inspect.getmembers(Engine, inspect.isfunction)
        if {"settings", "loras", "recipe"} & set(inspect.signature(method).parameters)
    }
    by_callers = {"choose_recipe", "read_loras", "plan"}  # no node calls them but to say which LoRAs
    assert {name for name in asking if not name.startswith("_")} == by_callers | (
        asking & set(vars(WithLoras))
    )


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("words", "counted_fps"), [("temporal", 48.0), ("spatial", 48.0), ("spatial", 24.0)])
def test_new_frames_are_made_to_the_sound_as_it_is(pack, host, monkeypatch, words, counted_fps, masked):
    grew = words == "temporal" or counted_fps == 24.0
    grown, seen = of_length(17, 48.0), {}
    grown = replace(grown, video=torch.randn_like(grown.video), audio=torch.randn_like(grown.audio))

    def sample(_text, shape, _guides, _settings, _seed, **named):
        seen.update(named)
        return replace(model().empty_latents(shape), video=torch.ones_like(grown.video))

    recipe = Recipe(sigmas=(1.0, 0.0), fast_fps=60.0, fps_limits=(12.0, 24.0))
    warned = []
    engine = SimpleNamespace(
        **vars(model()) | {"sample": sample, "recipe": recipe, "blocks": 12, "compile_cost": None},
        info=ModelInfo("", "", ""),
        nondeterministic=(),
        device=torch.device("cpu"),
        within_layers=lambda guidance: guidance,
    )
    for method in (Engine.add_frames, Engine.reads_slowed):
        setattr(engine, method.__name__, MethodType(method, engine))
    monkeypatch.setattr(host, "join_latents", lambda streams: Nested(*streams))
    monkeypatch.setattr(host, "is_watched", lambda: False)
    monkeypatch.setattr(host, "warn", lambda _node, warnings: warned.extend(warnings))
    node = type("Sampler", (pack.sampler.LockstepSampler,), {"hidden": SimpleNamespace(unique_id=None)})
    given = types.to_latents(grown, lambda streams: Nested(*streams), counted_fps=counted_fps)[2]
    if masked:
        half = torch.arange(grown.audio.shape[2]).view(1, 1, -1, 1) % 2
        given["noise_mask"] = Nested(torch.ones(1, 1, grown.video.shape[2], 1, 1), half.float())
    own = (types.OWN_ASPECT, 0, 0, 0.0, 0.0, 0, 0.0, 0.0, pack.sampler.OWN_SAMPLER, 7)
    node.run(engine, types.to_conditioning(script()), *own, latent=given, refine=words)
    told = "where frames were added the sound is kept as it is"
    assert any(text.startswith(told) for text in warned) == (grew and masked)
    assert any("a rate of 48 fps (12 to 24 fps)" in text for text in warned)
    made = types.from_joint_latent(pack.sampler.io.NodeOutput.call_args.args[2])
    assert (made.shape, made.video.mean()) == (grown.shape, 1)
    if grew:
        assert (seen["start"].shape.fps, seen["given_video"]) == (60, None)
        assert torch.equal(seen["given_audio"], seen["start"].audio)
        assert torch.equal(made.audio, grown.audio)
    else:
        assert (seen["start"].shape, "given_audio" in seen) == (grown.shape, masked)


@pytest.mark.parametrize("words", ["a bit", ",", "0", "1e-9", "1.5", "-0.5", "nan", "0.5 of it"])
def test_refining_by_other_words_is_refused(words):
    with pytest.raises(WorkflowError, match="use spatial or temporal after Lockstep Latent Upscale"):
        refining_levels(words, Recorder(), None, latents().shape)


@pytest.mark.parametrize(
    ("name", "wrong", "right", "sentence"),
    [
        ("refine", "a bit", ("", " ", "0.5", "Spatial", "0.9, 0"), "refine 'a bit' is not understood"),
        ("refine", ["0.5"], ("1",), "refine holds ['0.5']: text"),
        ("trajectory", "first", ("", " ", "all", "1, -1"), "trajectory: got 'first', step numbers such as"),
    ],
)
def test_words_of_the_sampler_are_read_before_the_run(pack, name, wrong, right, sentence):
    check = pack.sampler.LockstepSampler.validate_inputs
    assert check(**{name: wrong}).startswith(sentence)
    assert [check(**{name: words}) for words in (*right, None)] == [True] * (len(right) + 1)


def test_of_an_empty_latent_nothing_is_refined(pack):
    streams = types.given_streams(
        parts(replace(latents(), video=torch.zeros(1, 8, 3, 4, 6)))[2], None, model()
    )
    with pytest.raises(WorkflowError, match="latent is an empty latent, from which nothing is refined"):
        pack.sampler.latents_to_refine(streams, streams["video"].shape)


def test_long_words_for_refining_are_not_repeated_whole():
    with pytest.raises(WorkflowError) as told:
        refining_levels("a bit " * 1000, Recorder(), None, latents().shape)
    assert len(str(told.value)) < 350


@pytest.mark.parametrize("words", ["2, 1, 0", "0.9, 0.7", "0.5 0.5 0"])
def test_refining_by_levels_that_do_not_fall_to_nothing_is_refused(words):
    with pytest.raises(WorkflowError, match=f"refine '{words}' does not fall from 1 or less to 0"):
        refining_levels(words, Recorder(), None, latents().shape)


def test_a_picture_without_numbers_is_refused_by_its_input_s_name():
    with pytest.raises(MediaError, match="image holds values that are no numbers"):
        types.to_picture(torch.full((1, 3, 5, 3), torch.nan), None, 1.0)


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


@pytest.mark.parametrize("file", ["nodeDefs", "main"])
@pytest.mark.parametrize("language", ["zh", "ja"])
def test_a_translation_is_written_in_its_language(language, file):
    """Names that are the same everywhere stay as they are."""
    texts = json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))
    said = texts_of(texts)
    assert {text for _, text in said if not (CHINESE.search(text) or KANA.search(text))} <= KEPT_NAMES
    sentences = [text for name, text in said if name in ("description", "tooltip")]
    # a Japanese sentence has kana, a Chinese one has none
    assert [text for text in sentences if bool(KANA.search(text)) != (language == "ja")] == []


def texts_of(part: dict) -> list[tuple[str, str]]:
    """All texts below, each with the name that it has."""
    return [
        found
        for name, value in part.items()
        for found in (texts_of(value) if isinstance(value, dict) else [(name, value)])
    ]


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
    assert "MarkdownNote" in kinds
    assert set(kinds) - {"MarkdownNote"} <= set(SCHEMA)
    for node in workflow["nodes"]:
        assert {"id", "type", "pos", "size", "flags", "order", "mode", "properties"} <= set(node)
    for link, source, out, target, slot, kind in workflow["links"]:
        nodes = {node["id"]: node for node in workflow["nodes"]}
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link


def test_words_become_a_clip_by_five_of_our_nodes_and_two_of_the_host_s():
    twin = json.loads((ROOT / "tests/host/api/text_to_clip.json").read_text(encoding="utf-8"))
    kinds = sorted(node["class_type"] for node in twin.values())
    assert [kind for kind in kinds if kind not in OURS] == ["CreateVideo", "SaveVideo"]
    assert len(kinds) <= 5 + 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_s_note_names_what_one_may_change(path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    assert len(note) > 150
    kinds = [node["type"] for node in nodes if node["type"] in OURS]
    values = {
        name.replace("_", " ")
        for kind in kinds
        for name, spec in inputs_of(kind).items()
        if spec[0] in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
    }
    bold = " ".join(re.findall(r"\*\*(.+?)\*\*", note)).lower()
    # every note speaks of models and samplers
    assert [name for name in values - {"model", "sampler"} if re.search(rf"\b{name}\b", bold)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_s_thumbnail_shows_something(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert max(picture.size) == 384
        # of the channel that varies most: a red ball on gray is as bright as what is around it
        assert max(ImageStat.Stat(picture.convert("RGB")).stddev) > 10


def test_workflows_for_published_weights_alone_share_one_drawn_thumbnail():
    """No test runs those weights, and a picture by random ones would promise something else."""
    pictures = {path.stem: path.with_suffix(".jpg").read_bytes() for path in WORKFLOWS}
    drawn = pictures["ltx_one_stage"]
    assert [name for name, picture in pictures.items() if picture == drawn] == [
        "ltx_lora",
        "ltx_one_stage",
        "ltx_two_stage",
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_says_what_its_twin_says(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    twin = json.loads((ROOT / "tests/host/api" / path.name).read_text(encoding="utf-8"))
    assert to_api(workflow) == twin


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_that_needs_a_file_of_the_user_s_says_so_first(path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    told_first = re.match(r"\*\*(.+?)\*\*", note)
    # the picture of Load Image comes with ComfyUI
    loaders = {"LoadVideo": "Load Video", "LoadAudio": "Load Audio", "LockstepLoadAVLatent": "Load AV Latent"}
    for node in nodes:
        if node["type"] in loaders:
            assert loaders[node["type"]] in told_first.group(1)
            assert " first" in told_first.group(1)


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


def test_a_workflow_s_mask_lies_on_its_picture():
    """A picture that is cropped on its way from the mask's own node would lose its place below it."""
    twins = [
        json.loads((ROOT / "tests/host/api" / path.name).read_text(encoding="utf-8")) for path in WORKFLOWS
    ]
    masked = [
        (twin, node["inputs"])
        for twin in twins
        for node in twin.values()
        if node["class_type"] == "LockstepImageEncode" and "mask" in node["inputs"]
    ]
    assert masked
    for twin, inputs in masked:
        number = inputs["image"][0]
        while number != inputs["mask"][0]:
            between = twin[number]["inputs"]
            assert between["crop"] == "disabled"
            assert 0 in (between["width"], between["height"])
            number = between["image"][0]


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
