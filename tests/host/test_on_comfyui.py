"""The nodes in a real ComfyUI: what it shows of them, what they make, how they fail, what they leave behind."""

import io
import json
import os
import re
import subprocess
import time
from collections import Counter
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from comfyui import PACK, ROOT, STEPS, VERSION, ComfyUI, Listener, nodes_of, set_up, twin
from make_workflows import CHECKPOINT, GEMMA, LORA, UPSCALER
from PIL import Image
from published_models import write_gemma, write_monolith

from lockstep.model.engine import Engine, latent_sha256
from lockstep.model.latents.file import read_latents
from lockstep.model.media import read_clip
from lockstep.model.values import AVLatents

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
SCHEMA = HERE / "object_info.json"
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
# core nodes that the workflows use, and their inputs whose choices are files
CORE = {
    "CreateVideo": None,
    "GetVideoComponents": None,
    "ImageFromBatch": None,
    "ImageScale": None,
    "ImageScaleBy": None,
    "LoadAudio": ("audio", "sound.wav"),
    "LoadImage": ("image", "example.png"),
    "LoadVideo": ("file", "clip.mp4"),
    "SaveAnimatedWEBP": None,
    "SaveAudio": None,
    "SaveImage": None,
    "SaveVideo": None,
}
# writes what the repository keeps of a run: what ComfyUI shows of the nodes, and thumbnails of the workflows
FREEZE = bool(os.environ.get("LOCKSTEP_FREEZE"))


@pytest.fixture
def graph() -> dict:
    """Text to a clip of 13 frames in two steps, on the shipped weights where they are."""
    return twin("text_to_clip")


def with_seed(graph: dict, seed: int) -> dict:
    other = deepcopy(graph)
    other["3"]["inputs"]["seed"] = seed
    return other


def loads(server: ComfyUI) -> int:
    """How many components have been read from files so far."""
    return server.log.count("\nloaded ") - server.log.count("\nloaded completely")


# What ComfyUI shows


def test_the_pack_is_imported(server: ComfyUI):
    assert "IMPORT FAILED" not in server.log
    assert "comfy_entrypoint" not in server.log  # only a failure mentions it


def test_nodes_are_what_they_were(server: ComfyUI):
    """Graphs of users hold widget values by position: inputs are only ever appended."""
    shown = server.get("/object_info")
    seen = {name: shown[name] for name in sorted(shown) if name.startswith("Lockstep") or name in CORE}
    seen["LockstepLoader"]["input"]["required"]["model"][1]["options"] = ["embedded"]
    seen["LockstepLoadAVLatent"]["input"]["required"]["file"][1] |= {"options": [], "default": ""}
    for node, name in (("LockstepLoRA", "lora"), ("LockstepLatentUpscale", "upscaler")):
        seen[node]["input"]["required"][name][1] |= {"options": [], "default": ""}
    for node, file in CORE.items():
        if file:
            spec = seen[node]["input"]["required"][file[0]]
            if isinstance(spec[0], list):
                spec[0] = [file[1]]
            else:
                spec[1]["options"] = [file[1]]
    text = json.dumps(seen, indent=1) + "\n"
    if FREEZE:
        SCHEMA.write_text(text, encoding="utf-8")
    frozen = json.loads(SCHEMA.read_text(encoding="utf-8"))
    if server.version != VERSION:  # which says more of each node, and has core nodes of its own
        frozen = {name: node for name, node in frozen.items() if name not in CORE}
        seen = {name: {key: seen[name][key] for key in node} for name, node in frozen.items()}
    assert frozen == seen, "if meant, run once with LOCKSTEP_FREEZE=1"


def test_help_templates_and_translations_are_served(server: ComfyUI):
    for page in sorted((ROOT / "web").rglob("*.*")):
        name = page.relative_to(ROOT / "web").as_posix()
        if page.suffix in (".md", ".js"):
            assert server.get(f"/extensions/{PACK}/{name}") == page.read_text(encoding="utf-8")
    templates = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(server.get("/workflow_templates")[PACK]) == templates
    languages = server.get("/i18n")
    assert all("LockstepSampler" in languages[language]["nodeDefs"] for language in ("en", "zh", "ja"))


# What the nodes make


def test_text_becomes_a_clip_with_sound(server: ComfyUI, graph: dict):
    graph["3"]["inputs"]["seconds"] = 0  # the model's own length
    clip = server.clip_of(server.run(graph))
    with av.open(str(clip)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.width, picture.height, picture.average_rate) == (96, 96, Fraction(12))
        frames = sum(1 for _ in container.decode(picture))
    with av.open(str(clip)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        rate = container.streams.audio[0].rate
    assert frames == 25
    assert sound.codec_context.name == "aac"
    # AAC comes in blocks of 1024 samples and may begin with one of its own
    assert abs(samples / rate - frames / 12) <= 2 * 1024 / rate


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_runs_to_a_file(server: ComfyUI, name: str):
    if name == "file_to_clip" and not (server.base / "output" / "latents").exists():
        server.run(twin("latents_to_file", FREEZE))
    result = server.run(twin(name, FREEZE))
    assert result.status == "success", result.error
    files = server.files_of(result)
    assert files
    for file in files:
        check(file)
    if FREEZE and not name.startswith("ltx"):
        write_thumbnail(name, next(file for file in files if file.suffix not in (".flac", ".png")))


def write_thumbnail(name: str, file: Path) -> None:
    """A frame from the middle of what a workflow made, beside it."""
    if file.suffix == ".latent":
        frames = Engine("embedded", "cpu").decode_video(read_latents(file))
    elif file.suffix == ".webp":
        images = Image.open(file)
        images.seek(images.n_frames // 2)
        frames = torch.from_numpy(np.array(images.convert("RGB")))[None] / 255
    else:
        frames = read_clip(file).frames
    still = Image.fromarray((frames[len(frames) // 2] * 255).byte().numpy())
    still = still.resize((384 * still.width // max(still.size), 384 * still.height // max(still.size)))
    still.save(ROOT / "workflows" / f"{name}.jpg", quality=85)


def check(file: Path) -> None:
    """What a player finds in a file: every frame, sound as long as the pictures."""
    if file.suffix == ".webp":
        assert Image.open(file).n_frames == (25 if FREEZE else 13)
    elif file.suffix == ".png" and file.name.startswith("trajectory"):
        assert np.asarray(Image.open(file)).std() > 1
    elif file.suffix == ".png":  # the picture of a report
        assert Image.open(file).size == (960, 420)
        assert len(set(Image.open(file).convert("L").tobytes())) > 10
    elif file.suffix == ".latent":
        assert read_latents(file).video.std() > 0.1
    elif file.suffix == ".flac":
        with av.open(str(file)) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) in (
                round(13 / 12 * 16000),
                round(25 / 12 * 16000),
            )
    else:
        clip = read_clip(file)
        assert file.suffix == ".mp4"
        assert clip.frames.std() > 0.01
        assert clip.waveform is not None
        with av.open(str(file)) as container:
            samples = sum(frame.samples for frame in container.decode(audio=0))
            rate = container.streams.audio[0].rate
        # AAC comes in blocks of 1024 samples and may begin with one of its own
        assert abs(samples / rate - len(clip.frames) / clip.fps) <= 2 * 1024 / rate


def test_first_and_last_image_and_another_aspect(server: ComfyUI):
    graph = twin("image_to_clip")
    graph["10"] = {
        "class_type": "LockstepImageEncode",
        "inputs": {"conditioning": ["4", 0], "image": ["2", 0], "frame": -1, "strength": 0.8},
    }
    graph["5"]["inputs"] |= {"conditioning": ["10", 0], "aspect": "16:9", "fps": 16.0}
    clip = server.clip_of(server.run(graph))
    with av.open(str(clip)) as container:
        picture = container.streams.video[0]
        assert (picture.width, picture.height, picture.average_rate) == (176, 96, Fraction(16))
        assert sum(1 for _ in container.decode(picture)) == 17


def test_a_new_seed_reads_no_weights_and_a_new_name_samples_nothing(server: ComfyUI, graph: dict):
    server.run(graph)
    before = loads(server)
    again = server.run(with_seed(graph, 8))
    assert loads(server) == before
    assert {"1", "2"} <= again.cached
    assert "3" not in again.cached
    renamed = with_seed(graph, 8)
    renamed["7"]["inputs"]["filename_prefix"] = "video/other"
    assert {"1", "2", "3", "4", "5"} <= server.run(renamed).cached
    rewired = deepcopy(renamed)
    rewired["4"]["inputs"]["video"] = ["3", 2]  # the same latents by another output
    decoded = server.run(rewired)
    assert decoded.status == "success"
    assert {"1", "2", "3"} <= decoded.cached
    assert "4" not in decoded.cached


def test_two_loaders_and_another_workflow_share_the_weights(server: ComfyUI, graph: dict):
    server.run(with_seed(graph, 9))
    before = loads(server)
    graph["second"] = {"class_type": "LockstepLoader", "inputs": graph["1"]["inputs"] | {"device": "cpu"}}
    graph["4"]["inputs"]["model"] = graph["5"]["inputs"]["model"] = ["second", 0]
    for made in (with_seed(graph, 10), twin("landscape")):
        assert server.run(made).status == "success"
    assert loads(server) == before


def test_a_seed_means_the_same_twice(server: ComfyUI, graph: dict):
    """Latents and frames are; ComfyUI's H.264 encoder is not: the same frames may come out one level off."""
    graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "frame"}}
    graph["8"] = {
        "class_type": "LockstepSaveAVLatent",
        "inputs": {"latent": ["3", 2], "filename_prefix": "latents/same"},
    }

    def made(seed: int) -> list[np.ndarray]:
        files = server.files_of(server.run(with_seed(graph, seed)))
        latents = [read_latents(file) for file in files if file.suffix == ".latent"]
        pictures = [np.asarray(Image.open(file)) for file in files if file.suffix == ".png"]
        return [latents[0].video.numpy(), latents[0].audio.numpy(), np.stack(pictures)]

    first, other, again = made(21), made(22), made(21)
    for one, two, different in zip(first, again, other, strict=True):
        assert np.array_equal(one, two)
        assert not np.array_equal(one, different)


def test_a_picture_of_strength_0_changes_nothing(server: ComfyUI, graph: dict):
    graph["8"] = {
        "class_type": "LockstepSaveAVLatent",
        "inputs": {"latent": ["3", 2], "filename_prefix": "latents/none"},
    }

    def made() -> np.ndarray:
        files = server.files_of(server.run(with_seed(graph, 23)))
        return next(read_latents(file).video.numpy() for file in files if file.suffix == ".latent")

    plain = made()
    graph["9"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 96, "batch_size": 1, "color": 255},
    }
    inputs = {"conditioning": ["2", 0], "image": ["9", 0], "frame": -1, "strength": 0.0}
    graph["10"] = {"class_type": "LockstepImageEncode", "inputs": inputs}
    graph["3"]["inputs"]["conditioning"] = ["10", 0]
    assert np.array_equal(made(), plain)


def test_a_noise_mask_that_a_latent_file_does_not_keep_is_told(server: ComfyUI, graph: dict):
    inputs = {"model": ["1", 0], "latent": ["3", 2], "seconds": 1.0}
    graph["8"] = {"class_type": "LockstepExtend", "inputs": inputs}

    def told(saved: list) -> list[str]:
        inputs = {"latent": saved, "filename_prefix": "latents/longer"}
        graph["9"] = {"class_type": "LockstepSaveAVLatent", "inputs": inputs}
        return [text for text in server.texts_of(with_seed(graph, 24)) if "keeps no noise mask" in text]

    assert len(told(["8", 0])) == 1
    assert told(["3", 2]) == []


def test_a_saved_clip_holds_its_workflow_and_says_that_it_was_made_by_ai(server: ComfyUI):
    graph = twin("save_clip")
    (save,) = nodes_of(graph, "LockstepSaveClip")
    workflow = {"nodes": [], "version": 0.4}
    clip = server.clip_of(server.result(server.queue(graph, workflow=workflow)))
    with av.open(str(clip), options={"export_xmp": "1"}) as container:
        said = dict(container.metadata)
    assert json.loads(said["prompt"]) == graph
    assert json.loads(said["workflow"]) == workflow
    assert str(ROOT) not in said["prompt"]
    assert "digitalsourcetype/trainedAlgorithmicMedia" in said["xmp"]
    graph[save]["inputs"] |= {"disclosure": "none", "filename_prefix": "silent"}
    with av.open(str(server.clip_of(server.run(graph))), options={"export_xmp": "1"}) as container:
        assert "xmp" not in container.metadata


@pytest.mark.parametrize("name", ["ltx_lora", "ltx_two_stage"])
def test_a_clip_made_with_other_files_tells_no_folder(server: ComfyUI, name: str):
    with av.open(str(server.clip_of(server.run(twin(name))))) as container:
        said = container.metadata["prompt"]
    assert "LockstepLoader" in said
    assert str(server.base) not in said


def test_an_unknown_disclosure_is_refused_with_those_that_are_known(server: ComfyUI):
    graph = twin("save_clip")
    (save,) = nodes_of(graph, "LockstepSaveClip")
    graph[save]["inputs"]["disclosure"] = "photograph"
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    assert "use trainedAlgorithmicMedia" in json.dumps(answer["node_errors"][save])


def test_a_clip_that_cannot_be_signed_is_saved_and_the_node_says_why(server: ComfyUI):
    graph = twin("save_clip")
    (save,) = nodes_of(graph, "LockstepSaveClip")
    graph[save]["inputs"] |= {"content_credentials": True, "filename_prefix": "signed"}
    with Listener(server, "signer") as listener:
        check(server.clip_of(server.result(server.queue(graph, "signer"))))
        listener.wait_for("execution_success")
    assert any("not signed: no certificate with its key is configured" in text for text in listener.texts)


def test_a_clip_saved_at_another_speed_than_its_sound_is_told(server: ComfyUI):
    graph = twin("save_clip")
    (save,) = nodes_of(graph, "LockstepSaveClip")
    graph[save]["inputs"] |= {"fps": 6.0, "filename_prefix": "slow"}
    with Listener(server, "saver") as listener:
        check(server.clip_of(server.result(server.queue(graph, "saver"))))
        listener.wait_for("execution_success")
    assert any("at 12 fps both would be equally long" in text for text in listener.texts)


def test_the_trajectory_shows_the_chosen_steps_and_is_off_by_default(server: ComfyUI):
    graph = twin("trajectory")
    (sampler,) = nodes_of(graph, "LockstepSampler")
    for words, pictures in (("1, -1", 2), ("", 0)):
        graph[sampler]["inputs"] |= {"trajectory": words, "seed": 64}
        result = server.run(graph)
        assert result.status == "success", result.error
        files = server.files_of(result)
        assert [file.suffix for file in files].count(".png") == pictures
        assert [file.suffix for file in files].count(".mp4") == 1


def test_a_decoder_behind_a_bypassed_sampler_says_that_nothing_was_sampled(server: ComfyUI, graph: dict):
    graph["empty"] = spare_nodes()["long"]
    graph["empty"]["inputs"]["seconds"] = 1.0
    told = [text for text in server.texts_of(with_seed(graph, 65)) if "nobody has sampled it" in text]
    graph["4"]["inputs"]["video"] = graph["5"]["inputs"]["audio"] = ["empty", 0]  # as the page connects them
    del graph["3"]
    told.append("bypassed")
    told += [text for text in server.texts_of(graph) if "nobody has sampled it" in text]
    sentence = (
        "the latent is empty, nobody has sampled it: see that Lockstep Sampler is connected and not bypassed"
    )
    assert told == ["bypassed", sentence, sentence]


def test_numbers_of_numpy_are_taken(server: ComfyUI):
    graph = twin("clip_report")
    (sampler,), (report,) = nodes_of(graph, "LockstepSampler"), nodes_of(graph, "LockstepClipReport")
    widgets = {"filename_prefix": "numpy", "disclosure": "none", "content_credentials": False}
    clip = {name: graph[report]["inputs"][name] for name in ("images", "audio")}
    graph["saved"] = {"class_type": "LockstepSaveClip", "inputs": clip | widgets}
    graph["theirs"] = {"class_type": "AnotherNumber", "inputs": {}}
    graph[sampler]["inputs"]["seed"] = ["theirs", 3]
    graph[report]["inputs"]["fps"] = graph["saved"]["inputs"]["fps"] = ["theirs", 4]
    result = server.run(graph)
    assert result.status == "success", result.error


def test_a_constant_that_no_input_takes_is_told(server: ComfyUI, graph: dict):
    graph["2"]["inputs"]["prompts"] = "a blue ball"
    assert any("has no input 'prompts', it counts for nothing" in text for text in server.texts_of(graph))


def test_both_streams_travel_in_one_latent(server: ComfyUI, graph: dict):
    graph["4"]["inputs"]["video"] = graph["5"]["inputs"]["audio"] = ["3", 2]
    check(server.clip_of(server.run(with_seed(graph, 61))))


def test_only_the_masked_part_of_a_clip_is_made_anew(server: ComfyUI):
    graph = twin("clip_to_sound")
    (encoder,), (sampler,) = nodes_of(graph, "LockstepVideoEncode"), nodes_of(graph, "LockstepSampler")
    size = {"width": 96, "height": 96}
    graph |= {
        "zero": {"class_type": "SolidMask", "inputs": {"value": 0.0, **size}},
        "one": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 96}},
        "mask": {
            "class_type": "MaskComposite",
            "inputs": {"destination": ["zero", 0], "source": ["one", 0], "x": 32, "y": 0, "operation": "add"},
        },
        "masked": {
            "class_type": "SetLatentNoiseMask",
            "inputs": {"samples": [encoder, 0], "mask": ["mask", 0]},
        },
        "kept": {
            "class_type": "LockstepSaveAVLatent",
            "inputs": {"latent": [sampler, 2], "filename_prefix": "kept"},
        },
    }
    latents = []
    for given in ("masked", encoder):
        graph[sampler]["inputs"]["latent"] = [given, 0]
        files = server.files_of(server.run(graph))
        latents += [read_latents(file).video for file in files if file.suffix == ".latent"]
    anew, kept = latents
    assert torch.equal(anew[..., :2], kept[..., :2])
    assert not torch.isclose(anew[..., 2:], kept[..., 2:]).all(dim=(0, 1, 2)).any()


@pytest.mark.parametrize(
    "choice",
    [
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"precision": "float8"},
        {"offload": "always"},
        {"offload": "stream"},
        {"attention": "pytorch"},
    ],
)
def test_every_way_to_run_makes_a_clip(server: ComfyUI, graph: dict, choice: dict):
    graph["1"]["inputs"] |= choice
    check(server.clip_of(server.run(with_seed(graph, 62))))
    requested = server.log.count("Requested to load AVTransformer")
    server.run(with_seed(graph, 63))
    moved = server.log.count("Requested to load AVTransformer") - requested
    assert (moved > 0) == (choice.get("offload") == "always")
    assert ("blocks come to cpu one by one" in server.log) >= (choice.get("offload") == "stream")


def sampled(server: ComfyUI, graph: dict, latent: str = "3") -> AVLatents:
    """The joint latent that one node of a graph puts out, for a LockstepSampler."""
    graph = graph | {
        "kept": {
            "class_type": "LockstepSaveAVLatent",
            "inputs": {"latent": [latent, 2], "filename_prefix": "latents/sampled"},
        }
    }
    result = server.run(graph)
    assert result.status == "success", result.error
    return read_latents(next(file for file in server.files_of(result) if file.suffix == ".latent"))


def test_a_lora_changes_the_clip_and_leaves_the_model_as_it_was(server: ComfyUI, graph: dict):
    plain = sampled(server, graph)
    before = loads(server)
    graph["lora"] = spare_nodes()["lora"]
    graph["3"]["inputs"]["model"] = ["lora", 0]
    changed = sampled(server, graph)
    assert (changed.video - plain.video).abs().max() > 0.01
    graph["lora"]["inputs"]["strength"] = 0.0
    assert latent_sha256(sampled(server, graph)) == latent_sha256(plain)
    assert loads(server) == before  # the weights are shared


def test_two_stages_make_a_larger_clip_with_the_sound_s_length(server: ComfyUI):
    graph = twin("ltx_two_stage")
    first, second = nodes_of(graph, "LockstepSampler")
    small, large = sampled(server, graph, first), sampled(server, graph, second)
    assert (large.shape.width, large.shape.height) == (2 * small.shape.width, 2 * small.shape.height)
    assert large.shape.frames == small.shape.frames
    assert large.audio.shape == small.audio.shape


def test_refining_keeps_what_it_goes_on_from(server: ComfyUI, graph: dict):
    """The smaller the share that is made anew, the nearer the clip stays."""
    graph["3"]["inputs"]["seconds"] = 1.0
    first = sampled(server, graph)
    graph["again"] = deepcopy(graph["3"])
    distances = []
    for share in ("0.2", "0.9"):
        graph["again"]["inputs"] |= {"latent": ["3", 2], "seed": 99, "refine": share}
        distances.append((sampled(server, graph, "again").video - first.video).square().mean())
    assert 0 < distances[0] < distances[1]


def test_the_model_s_own_sampler_is_the_default(server: ComfyUI, graph: dict):
    assert graph["3"]["inputs"]["sampler"] == "model default"
    own = sampled(server, graph)
    graph["3"]["inputs"]["sampler"] = "euler"  # the recipe's
    assert latent_sha256(sampled(server, graph)) == latent_sha256(own)


def test_models_of_every_configured_folder_are_offered(server: ComfyUI, graph: dict):
    offered = server.get("/object_info/LockstepLoader")["LockstepLoader"]["input"]["required"]["model"][1][
        "options"
    ]
    assert offered[0] == "embedded"
    assert {"random.safetensors", "damaged.safetensors", "ltx/other.safetensors"} <= set(offered)
    graph["1"]["inputs"]["model"] = "ltx/other.safetensors"
    assert server.run(graph).status == "success"


def test_a_shipped_workflow_runs_on_published_files_and_finds_a_part_that_was_missing(server: ComfyUI):
    """At a few channels, but named and laid out as published; the text encoder comes after a first run in vain."""
    graph = json.loads((HERE / "api" / "ltx_one_stage.json").read_text(encoding="utf-8"))
    (sampler,) = nodes_of(graph, "LockstepSampler")
    size = {"aspect": "custom", "width": 64, "height": 64, "seconds": 0.375, "fps": 24.0}
    graph[sampler]["inputs"] |= size | {"steps": STEPS}
    models = server.base / "models"
    main, part = models / "checkpoints" / CHECKPOINT, models / "text_encoders" / GEMMA
    part.parent.mkdir(exist_ok=True)
    try:
        write_monolith(main, "2.3")
        missing = server.run(graph)
        assert missing.status == "error"
        assert "no text encoder" in missing.error
        write_gemma(part, "2.3")
        found = server.run(graph)
        assert found.status == "success", found.error
    finally:
        main.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def test_another_pack_beside_it_lives_too(server: ComfyUI):
    shown = server.get("/object_info")
    assert "AnotherShout" in shown
    assert "LockstepSampler" in shown
    result = server.run({"shout": {"class_type": "AnotherShout", "inputs": {"text": "ball"}}})
    assert result.outputs["shout"]["text"] == ["BALL"]


def test_progress_and_previews_arrive(server: ComfyUI, graph: dict):
    with Listener(server, "watcher") as listener:
        server.result(server.queue(with_seed(graph, 31), "watcher"))
        listener.wait_for("execution_success")
        assert any("took" in text for text in listener.texts)
    steps = {(data["value"], data["max"]) for name, data in listener.events if name == "progress"}
    assert {(step + 1, STEPS) for step in range(STEPS)} <= steps
    assert Image.open(io.BytesIO(listener.previews[0])).size == (512, 512)  # the host enlarges what it sends


def test_the_preview_moves_within_a_step_and_names_its_node(server: ComfyUI, graph: dict):
    graph["slow"] = {"class_type": "AnotherSlowModel", "inputs": {"model": ["1", 0]}}
    graph["3"]["inputs"] |= {"model": ["slow", 0], "steps": 3}
    with Listener(server, "viewer", facts=True) as listener:
        prompt_id = server.queue(with_seed(graph, 32), "viewer")
        server.result(prompt_id)
        listener.wait_for("execution_success")
        received = len(listener.previews)
        time.sleep(0.5)
        assert len(listener.previews) == received  # nothing goes on behind the run
    within = [set()]
    for name, data in listener.events:
        if name == "progress" and data["node"] == "3":
            within.append(set())
        elif name == "preview":
            within[-1].add(data["picture"])
            assert (data["node_id"], data["prompt_id"]) == ("3", prompt_id)
    assert max(len(pictures) for pictures in within[1:-1]) >= 3
    assert any("s left" in text for text in listener.texts)


def test_unknown_words_are_named_on_the_node(server: ComfyUI, graph: dict):
    graph["2"]["inputs"]["prompt"] = "a red ball bounces on zorbly gray"
    assert any("zorbly" in text for text in server.texts_of(graph))


def test_ten_runs_take_no_more_memory_than_three(server: ComfyUI, graph: dict):
    """Queued at once, as a user queues them over night."""
    graph["census"] = {"class_type": "AnotherCensus", "inputs": {"images": ["4", 0], "audio": ["5", 0]}}
    queued = [server.queue(with_seed(graph, seed)) for seed in range(100, 110)]
    counts = [server.result(prompt_id).outputs["census"]["bytes"] for prompt_id in queued]
    tensors, resident = zip(*counts, strict=True)
    assert (
        tensors[-1] - tensors[2] < 13 * 96 * 96 * 3 * 4
    )  # the frames of one clip: seven would be left behind
    assert resident[-1] < resident[2] * 1.02  # allocators settle in the first runs


# How they fail


@pytest.mark.parametrize(
    ("node", "wrong", "sentence"),
    [
        ("1", {"model": "no-such.safetensors"}, "no model file 'no-such.safetensors'"),
        ("1", {"model": "damaged.safetensors"}, "damaged.safetensors"),
        ("1", {"device": "abacus"}, "use auto or cpu"),
        ("1", {"precision": "int4"}, "use auto, float32, bfloat16, float16 or float8"),
        ("1", {"offload": "never"}, "use auto, always or stream"),
        ("1", {"attention": "magic"}, "use auto, pytorch"),
        ("1", {"attention": "sageattention"}, "attention 'sageattention' needs a CUDA device"),
        ("2", {"prompt": "  "}, "prompt is empty"),
        ("3", {"aspect": "1:7"}, "use model default"),
        ("3", {"sampler": "magic"}, "use model default, euler"),
        ("3", {"steps": -1}, "steps"),
        ("3", {"conditioning": ["1", 0]}, "CONDITIONING"),
        ("3", {"stg": -2.0}, "stg"),
        ("3", {"latent": ["4", 0]}, "LATENT"),
        ("3", {"trajectory_moment": 1.5}, "trajectory_moment"),
        ("3", {"step_cache": 1.5}, "step_cache"),
        ("3", {"trajectory": "first"}, "trajectory: got 'first', step numbers such as"),
        ("3", {"refine": "a bit"}, "refine 'a bit' is not understood: use spatial"),
        ("3", {"refine": "1.5"}, "refine '1.5' lies outside 0.01 to 1"),
        ("3", {"refine": "0.5, 0.7, 0"}, "refine '0.5, 0.7, 0' does not fall from 1 or less to 0"),
        ("4", {"video": ["2", 0]}, "LATENT"),
        ("late", {"strength": 1.5}, "strength"),
        ("late", {"attention": 1.5}, "attention"),
        ("late", {"image": ["2", 0]}, "IMAGE"),
        ("late", {"mask": ["one", 0]}, "MASK"),
        ("late", {"use_as": "hint"}, "use frame or reference"),
        (
            "lora",
            {"lora": "no-such.safetensors"},
            "no file 'no-such.safetensors' in ComfyUI's folder loras: use",
        ),
        ("lora", {"lora": "../checkpoints/random.safetensors"}, "no file '../checkpoints"),
        ("lora", {"strength": 11.0}, "strength"),
        ("upscale", {"upscaler": "no-such.safetensors"}, "in ComfyUI's folder latent_upscale_models: use"),
        ("keep", {"filename_prefix": " "}, "filename_prefix is empty: use a name such as"),
        (
            "keep",
            {"filename_prefix": "../out"},
            "'../out' lies outside the output folder: use a name such as",
        ),
        ("1", {"model": 5}, "model holds 5: text or a choice"),
        ("lora", {"lora": 5}, "lora holds 5: text or a choice"),
        ("file", {"file": 5}, "file holds 5: text or a choice"),
        ("file", {"file": "no-such.latent"}, "no latent file 'no-such.latent'"),
        ("file", {"file": "../../models/checkpoints/random.safetensors"}, "no latent file"),
    ],
)
def test_wrong_values_are_refused_before_the_run(server: ComfyUI, graph: dict, node, wrong, sentence):
    graph |= spare_nodes()
    graph["3"]["inputs"] |= {"model": ["lora", 0], "conditioning": ["late", 0], "latent": ["file", 0]}
    graph["5"]["inputs"]["audio"] = ["upscale", 0]
    save = {"latent": ["3", 2], "filename_prefix": "latents/spare"}
    graph["keep"] = {"class_type": "LockstepSaveAVLatent", "inputs": save}
    graph[node]["inputs"] |= wrong
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    assert sentence in json.dumps(answer["node_errors"][node], ensure_ascii=False)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("1", "model"),
        ("1", "device"),
        ("2", "prompt"),
        ("3", "aspect"),
        ("3", "sampler"),
        ("lora", "lora"),
        ("upscale", "upscaler"),
        ("keep", "filename_prefix"),
        ("file", "file"),
    ],
)
def test_an_input_that_is_missing_is_told_as_such(server: ComfyUI, graph: dict, node: str, name: str):
    graph |= spare_nodes()
    graph["3"]["inputs"] |= {"model": ["lora", 0], "conditioning": ["late", 0], "latent": ["file", 0]}
    graph["5"]["inputs"]["audio"] = ["upscale", 0]
    graph["keep"] = {
        "class_type": "LockstepSaveAVLatent",
        "inputs": {"latent": ["3", 2], "filename_prefix": "a"},
    }
    del graph[node]["inputs"][name]
    errors = server.refuse(graph, node)
    assert [(error["type"], error["details"]) for error in errors] == [("required_input_missing", name)]


@pytest.mark.parametrize(
    ("node", "wrong", "sentence"),
    [
        ("2", {"prompt": "xyzzy plugh"}, "it knows"),
        ("3", {"seconds": 90.0}, "use 4.2"),
        ("3", {"fps": 5.0}, "use 12"),
        ("3", {"aspect": "custom", "width": 112, "height": 1024}, "use 176"),
        ("3", {"stg": 1.0, "stg_block": 99}, "stg_block 99 is none of this model's blocks"),
        ("3", {"latent": ["short", 0]}, "images: frames must be 4k+1, got 14: use 13 or 17"),
        (
            "3",
            {"latent": ["odd", 0]},
            "images: width 70 pixels is outside what this model was trained on, 96 to 176",
        ),
        ("3", {"latent": ["mute", 0]}, "use 1"),
        ("3", {"latent": ["empty", 0]}, "is needed: connect a latent of this model"),
        ("3", {"latent": ["theirs", 0]}, "latent is of the latent space"),
        ("3", {"audio_latent": ["clip", 0]}, "audio_latent holds a video and no sound"),
        (
            "3",
            {"latent": ["long", 0], "audio_latent": ["sound", 0]},
            "encode it with the clip's seconds and fps",
        ),
        ("3", {"model": ["other", 0]}, "this conditioning was encoded by"),
        ("4", {"model": ["other", 0]}, "these latents are of the space"),
        ("4", {"video": ["sound", 0]}, "connect the sampler's video output"),
        ("3", {"trajectory": "7"}, "use 1 to 2"),
        ("late", {"mask": ["white", 0]}, "mask frees the whole image"),
        ("4", {"video": ["empty", 0]}, "is needed: connect a latent of this model"),
        ("4", {"video": ["3", 1]}, "connect the sampler's video output"),
        ("5", {"audio": ["3", 0]}, "connect the sampler's audio output"),
        ("3", {"conditioning": ["zeroed", 0]}, "changed by a node in between"),
        ("3", {"conditioning": ["both", 0]}, "holds 2 prompts"),
        ("3", {"conditioning": ["batch", 0]}, "holds 2 pictures"),
        ("3", {"conditioning": ["late", 0]}, "use 0 to 12"),
        ("3", {"conditioning": ["twice", 0]}, "two pictures at frame 0"),
        ("3", {"refine": "0.5"}, "latent holds no video and no audio"),
        ("3", {"latent": ["clip", 0], "refine": "0.5"}, "latent holds no audio: connect the av_latent of"),
        (
            "3",
            {"latent": ["long", 0], "refine": "0.5"},
            "latent is an empty latent, from which nothing is refined",
        ),
        (
            "3",
            {"latent": ["clip", 0], "audio_latent": ["sound", 0], "refine": "0.5", "step_cache": 0.1},
            "for clips made from noise",
        ),
        ("3", {"conditioning": ["weak", 0]}, "a picture at frame 0 is part of the clip"),
        ("3", {"model": ["foreign", 0]}, "nothing in this LoRA fits this model"),
        ("4", {"video": ["mistaken", 0]}, "no latent upscaler: it holds"),
        ("4", {"video": ["silent", 0]}, "latent holds video alone: connect an av_latent output"),
        (
            "3",
            {"conditioning": None},
            "conditioning holds nothing, CONDITIONING is needed: connect the conditioning output of",
        ),
        (
            "3",
            {"model": "embedded"},
            "model holds 'embedded', LOCKSTEP_MODEL is needed: connect the model output of",
        ),
        ("3", {"latent": "none"}, "latent holds 'none', LATENT is needed: connect a latent, such as"),
        ("3", {"aspect": None}, "aspect holds nothing: text or a choice of its list is needed"),
        ("late", {"use_as": None}, "use_as holds nothing"),
        ("3", {"fps": float("nan")}, "fps holds nan: a number from 0.0 to 120.0 is needed"),
        ("4", {"video": 5}, "video holds 5, LATENT is needed: connect a latent, such as"),
        (
            "late",
            {"image": "example.png"},
            "image holds 'example.png', IMAGE is needed: connect the images output of",
        ),
    ],
)
def test_what_shows_only_in_the_run_is_told_in_one_sentence(
    server: ComfyUI, graph: dict, node, wrong, sentence
):
    graph |= spare_nodes()  # only those that the saved clip depends on are run
    graph[node]["inputs"] |= wrong
    if node == "late":
        graph["3"]["inputs"]["conditioning"] = ["late", 0]
    result = server.run(graph)
    assert result.status == "error"
    assert sentence in result.error
    assert "\n" not in result.error
    links = [value[0] for value in wrong.values() if isinstance(value, list)]
    culprit = next((linked for linked in links if linked in WRONG_THEMSELVES), node)
    assert result.messages["execution_error"]["node_id"] == culprit


# spare nodes that cannot do what they are for, whoever is connected to them
WRONG_THEMSELVES = {"short", "odd", "mute", "batch", "foreign", "mistaken", "silent", "twice", "weak"}


def test_after_errors_the_server_makes_the_same_clip(server: ComfyUI, graph: dict):
    first = latent_sha256(sampled(server, with_seed(graph, 25)))
    for wrong in ({"fps": float("nan")}, {"conditioning": ["zeroed", 0]}, {"latent": ["theirs", 0]}):
        faulty = with_seed(graph, 25) | spare_nodes()
        faulty["3"]["inputs"] |= wrong
        assert server.run(faulty).status == "error"
    assert latent_sha256(sampled(server, with_seed(graph, 25))) == first


def spare_nodes() -> dict:
    def image_encode(text: str, image: str, frame: int, **more: float) -> dict:
        inputs = {"conditioning": [text, 0], "image": [image, 0], "frame": frame, "strength": 1.0}
        return {"class_type": "LockstepImageEncode", "inputs": inputs | more}

    def empty_image(batch: int, width: int = 96) -> dict:
        inputs = {"width": width, "height": 96, "batch_size": batch, "color": 0}
        return {"class_type": "EmptyImage", "inputs": inputs}

    def video_encode(pictures: str) -> dict:
        inputs = {"model": ["1", 0], "images": [pictures, 0], "fps": 0.0}
        return {"class_type": "LockstepVideoEncode", "inputs": inputs}

    def audio_encode(sound: str) -> dict:
        inputs = {"model": ["1", 0], "audio": [sound, 0], "seconds": 0.0, "fps": 0.0}
        return {"class_type": "LockstepAudioEncode", "inputs": inputs}

    def empty_latent(model: str, seconds: float) -> dict:
        inputs = {"aspect": "1:1", "width": 96, "height": 96, "seconds": seconds, "fps": 0.0}
        return {"class_type": "LockstepEmptyAVLatent", "inputs": {"model": [model, 0], **inputs}}

    def silence(seconds: float) -> dict:
        return {
            "class_type": "EmptyAudio",
            "inputs": {"duration": seconds, "sample_rate": 44100, "channels": 2},
        }

    def lora(name: str) -> dict:
        return {"class_type": "LockstepLoRA", "inputs": {"model": ["1", 0], "lora": name, "strength": 1.0}}

    def upscale(latent: list, name: str) -> dict:
        inputs = {"model": ["1", 0], "latent": latent, "upscaler": name}
        return {"class_type": "LockstepLatentUpscale", "inputs": inputs}

    both = {"conditioning_1": ["2", 0], "conditioning_2": ["2", 0]}
    size = {"width": 96, "height": 96, "length": 9, "batch_size": 1}
    return {
        "empty": {"class_type": "EmptyLTXVLatentVideo", "inputs": size},
        "zeroed": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
        "both": {"class_type": "ConditioningCombine", "inputs": both},
        "one": empty_image(1),
        "two": empty_image(2),
        "white": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 96, "height": 96}},
        "fourteen": empty_image(14),
        "thirteen": empty_image(13),
        "seventy": empty_image(13, 70),
        "short": video_encode("fourteen"),
        "odd": video_encode("seventy"),
        "clip": video_encode("thirteen"),
        "half": silence(0.5),
        "second": silence(1.0),
        "mute": audio_encode("half"),
        "sound": audio_encode("second"),
        "other": {
            "class_type": "LockstepLoader",
            "inputs": {"model": "random.safetensors", "device": "auto"},
        },
        "lora": lora(LORA),
        "foreign": lora("foreign.safetensors"),
        "upscale": upscale(["long", 0], UPSCALER),
        "mistaken": upscale(["long", 0], "mistaken.safetensors"),
        "silent": upscale(["clip", 0], UPSCALER),
        "theirs": empty_latent("other", 1.0),
        "long": empty_latent("1", 3.0),
        "file": {"class_type": "LockstepLoadAVLatent", "inputs": {"file": "no-such.latent"}},
        "batch": image_encode("2", "two", 0),
        "late": image_encode("2", "one", 25),
        "start": image_encode("2", "one", 0),
        "weak": image_encode("2", "one", 0, attention=0.5),
        "twice": image_encode("start", "one", 0),
    }


def interrupted(server: ComfyUI, graph: dict, node: str) -> list[float]:
    """All that this node told of its progress, interrupted as soon as it had told any."""
    with Listener(server, "stopper") as listener:
        prompt_id = server.queue(graph, "stopper")
        try:
            listener.wait_for("progress", node=node)
        finally:  # or it would hold up the tests that follow
            server.post("/interrupt", {"prompt_id": prompt_id})
        result = server.result(prompt_id, seconds=60)
        listener.wait_for("execution_interrupted")
    assert result.messages["execution_interrupted"]["node_id"] == node
    return [data["value"] for name, data in listener.events if name == "progress" and data["node"] == node]


def test_interrupt_stops_within_a_step_and_the_next_run_works(server: ComfyUI, graph: dict):
    long = with_seed(graph, 41)
    long["slow"] = {"class_type": "AnotherSlowModel", "inputs": {"model": ["1", 0]}}
    long["3"]["inputs"] |= {"model": ["slow", 0], "steps": 1000}
    told = interrupted(server, long, "3")
    assert max(told) <= told[0] + 1  # one may have been on its way
    assert server.run(with_seed(graph, 42)).status == "success"


@pytest.mark.parametrize("node", ["4", "5"], ids=["video", "audio"])
def test_a_decode_can_be_interrupted(server: ComfyUI, graph: dict, node: str):
    slow = with_seed(graph, 43)
    slow["slow"] = {"class_type": "AnotherSlowModel", "inputs": {"model": ["1", 0]}}
    slow[node]["inputs"]["model"] = ["slow", 0]
    told = interrupted(server, slow, node)
    assert len(told) <= 2  # one may have been on its way
    assert server.run(with_seed(graph, 43)).status == "success"


@pytest.mark.parametrize(
    ("kind", "widgets"),
    [
        (
            "LockstepSaveClip",
            {"filename_prefix": "cut/short", "disclosure": "none", "content_credentials": False},
        ),
        ("LockstepClipReport", {}),
    ],
)
def test_what_looks_at_a_whole_clip_can_be_interrupted_and_leaves_nothing(
    server: ComfyUI, kind: str, widgets: dict
):
    large = {
        "pictures": {
            "class_type": "EmptyImage",
            "inputs": {"width": 512, "height": 512, "batch_size": 200, "color": 255},
        },
        "last": {"class_type": kind, "inputs": {"images": ["pictures", 0], "fps": 24.0, **widgets}},
    }
    with Listener(server, "stopper") as listener:
        prompt_id = server.queue(large, "stopper")
        listener.wait_for("progress", node="last", max=200)
        server.post("/interrupt", {"prompt_id": prompt_id})
        result = server.result(prompt_id, seconds=60)
    assert result.messages["execution_interrupted"]["node_id"] == "last"
    assert not list((server.base / "output" / "cut").glob("*"))


def test_the_report_of_a_long_sound_tells_its_progress_and_can_be_interrupted(server: ComfyUI):
    long = {
        "pictures": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 0},
        },
        "sound": {
            "class_type": "EmptyAudio",
            "inputs": {"duration": 1200.0, "sample_rate": 44100, "channels": 2},
        },
        "last": {
            "class_type": "LockstepClipReport",
            "inputs": {"images": ["pictures", 0], "fps": 24.0, "audio": ["sound", 0]},
        },
    }
    with Listener(server, "stopper") as listener:
        prompt_id = server.queue(long, "stopper")
        until = time.monotonic() + 60
        while not any(re.match(r"\d+ of \d\d+, \d+ s left", text) for text in listener.texts):
            assert time.monotonic() < until, listener.texts
            time.sleep(0.02)
        server.post("/interrupt", {"prompt_id": prompt_id})
        result = server.result(prompt_id, seconds=60)
    assert result.messages["execution_interrupted"]["node_id"] == "last"


@pytest.mark.parametrize(
    ("node", "task"), [("3", "sampling 13 frames of 96x96"), ("4", "decoding 13 frames")]
)
def test_missing_memory_is_told_by_the_node_that_needs_it(server: ComfyUI, graph: dict, node: str, task: str):
    graph["poor"] = {"class_type": "AnotherNoMemory", "inputs": {"model": ["1", 0]}}
    graph[node]["inputs"]["model"] = ["poor", 0]
    result = server.run(with_seed(graph, 44))
    assert result.messages["execution_error"]["node_id"] == node
    assert result.error.startswith(f"out of memory while {task}")
    assert "make the clip smaller or shorter" in result.error
    graph[node]["inputs"]["model"] = ["1", 0]
    assert server.run(graph).status == "success"


def free(server: ComfyUI, **what: bool) -> None:
    server.post("/free", what)
    time.sleep(2)  # done by the worker when it next looks, and told nowhere


def test_latents_are_the_same_wherever_weights_lie(server: ComfyUI, graph: dict):
    graph["8"] = {
        "class_type": "LockstepSaveAVLatent",
        "inputs": {"latent": ["3", 2], "filename_prefix": "latents/placed"},
    }

    def latents(seed: int, offload: str) -> AVLatents:
        graph["1"]["inputs"]["offload"] = offload
        files = server.files_of(server.run(with_seed(graph, seed)))
        return read_latents(next(file for file in files if file.suffix == ".latent"))

    first, _other = latents(54, "auto"), latents(55, "auto")
    moved, streamed = latents(54, "always"), latents(54, "stream")
    free(server, unload_models=True, free_memory=True)  # read from the file again
    for again in (moved, streamed, latents(54, "auto"), latents(54, "stream")):
        assert latent_sha256(again) == latent_sha256(first)


def test_its_memory_manager_takes_stacks_whole_and_streamed():
    """Bytes: 560 in all, 320 where the six layers are streamed."""
    host, script = set_up(), Path(__file__).with_name("placing.py")
    ran = subprocess.run(
        [host / "bin" / "python", script, host / "comfyui", ROOT], capture_output=True, text=True, check=True
    )
    steps, hooks_left = json.loads(ran.stdout.splitlines()[-1])
    whole, streamed = [["ModelPatcher", 560]], [["_Streamed", 320]]
    assert [held for held, _ in steps] == [whole, streamed, streamed, whole, [], streamed, streamed]
    assert all(same for _, same in steps)
    assert hooks_left == 0
    assert "memory leak" not in ran.stderr


PARTS = {"WordEncoder", "Connectors", "AVTransformer", "VideoVAE", "AudioVAE", "GriffinLim"}


def moved_in(server: ComfyUI) -> Counter[str]:
    """How often each kind of module has come to the device so far."""
    return Counter(line.split()[-1] for line in server.log.splitlines() if "Requested to load " in line)


@pytest.mark.parametrize("how", ["unload_models", "free_memory"])
def test_freed_models_come_back(server: ComfyUI, graph: dict, how: str):
    def moved_and_read(seed: int) -> tuple[Counter[str], int]:
        """By a run in which every part of the model has something to do."""
        before, read = moved_in(server), loads(server)
        graph["2"]["inputs"]["prompt"] = f"a red ball bounces {'on and ' * (seed % 5)}on gray"
        assert server.run(with_seed(graph, seed)).status == "success"
        return moved_in(server) - before, loads(server) - read

    moved_and_read(51)
    assert moved_and_read(52) == (Counter(), 0)
    free(server, **{how: True})
    # moved away and back, or read again where nothing held them any longer
    assert moved_and_read(53) == (Counter(PARTS), {"unload_models": 0, "free_memory": len(PARTS)}[how])
    assert "memory leak" not in server.log
