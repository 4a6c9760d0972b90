"""What is said of masks beside their pictures and of links between sockets, in a real ComfyUI."""

import pytest
from comfyui import ComfyUI, nodes_of, twin
from PIL import Image

pytestmark = pytest.mark.host


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph(server: ComfyUI) -> dict:
    """A picture of 96x48 whose left half is transparent, held by a prompt; nothing is sampled."""
    picture = Image.new("RGBA", (96, 48), (200, 40, 40, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 48, 48))
    picture.save(server.base / "input" / "half.png")
    size = {"upscale_method": "area", "width": 64, "height": 0, "crop": "disabled"}
    held = {"conditioning": ["text", 0], "image": ["small", 0], "frame": 0, "strength": 1.0}
    return {
        "loader": twin("text_to_clip")["1"],
        "text": node("LockstepTextEncode", model=["loader", 0], prompt="a red ball bounces", negative=""),
        "file": node("LoadImage", image="half.png"),
        "small": node("ImageScale", image=["file", 0], **size),
        "held": node("LockstepImageEncode", **held, mask=["file", 1]),
        "out": node("PreviewAny", source=["held", 0]),
    }


def test_a_mask_lies_where_its_picture_does_or_is_refused(server: ComfyUI, graph: dict):
    result = server.run(graph)
    assert result.status == "success", result.error
    graph["small"]["inputs"] |= {"height": 64, "crop": "center"}
    refused = server.run(graph)
    assert refused.status == "error"
    assert refused.error.startswith(
        "mask is 96x48 and image 64x64, which is another aspect: connect the mask"
    )
    scaled = {"upscale_method": "area", "width": 64, "height": 64, "crop": "center"}
    graph |= {
        "drawn": node("MaskToImage", mask=["file", 1]),
        "cropped": node("ImageScale", image=["drawn", 0], **scaled),
        "again": node("ImageToMask", image=["cropped", 0], channel="red"),
    }
    graph["held"]["inputs"]["mask"] = ["again", 0]
    result = server.run(graph)
    assert result.status == "success", result.error


def test_a_mask_without_white_is_told_unless_the_picture_has_no_alpha(server: ComfyUI, graph: dict):
    def told(mask: list) -> list[str]:
        graph["held"]["inputs"]["mask"] = mask
        return [text for text in server.texts_of(graph) if text.startswith("mask has nothing white")]

    graph["black"] = node("SolidMask", value=0.0, width=96, height=48)
    graph["opaque"] = node("LoadImage", image="example.png")
    assert told(["black", 0]) == ["mask has nothing white: the whole picture is held"]
    assert told(["opaque", 1]) == []


TYPE_IN = "type a value into the node or connect an output of type"


@pytest.mark.parametrize(
    ("place", "checked", "wrong", "sentence"),
    [
        ("text", "prompt", {"model": ["file", 0]},
         "model is linked to IMAGE, LOCKSTEP_MODEL is needed: connect the model output of Lockstep Loader"),
        ("held", "", {"conditioning": ["loader", 0]},
         "conditioning is linked to LOCKSTEP_MODEL, CONDITIONING is needed: connect the conditioning output of Lockstep Text Encode"),
        ("held", "", {"mask": ["file", 0]}, "mask is linked to IMAGE, MASK is needed: connect the MASK of Load Image"),
        ("held", "", {"frame": ["file", 0]}, f"frame is linked to IMAGE, INT is needed: {TYPE_IN} INT"),
        ("held", "", {"image": ["file", 1], "strength": ["loader", 0]},
         "image is linked to MASK, IMAGE is needed: connect the images output of Lockstep VAE Decode or the IMAGE of Load Image; "
         f"strength is linked to LOCKSTEP_MODEL, FLOAT is needed: {TYPE_IN} FLOAT"),
        ("sampler", "aspect sampler trajectory refine", {"latent": ["file", 0]},
         "latent is linked to IMAGE, LATENT is needed: connect a latent, such as av_latent of Lockstep Sampler"),
        ("sampler", "aspect sampler trajectory refine", {"latent": ["file", 0], "aspect": "5:1"},
         "latent is linked to IMAGE, LATENT is needed: connect a latent, such as av_latent of Lockstep Sampler; "
         "unknown aspect '5:1': use model default, 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16, 768x512, 512x768, "
         "1280x704, 704x1280, 1920x1088 or custom"),
        ("decoded", "", {"video": ["text", 0]},
         "video is linked to CONDITIONING, LATENT is needed: connect a latent, such as av_latent of Lockstep Sampler"),
        ("encoded", "", {"audio": ["file", 0]},
         "audio is linked to IMAGE, AUDIO is needed: connect the audio output of Lockstep Audio Decode or of Load Audio"),
        ("saved", "disclosure filename_prefix", {"audio": ["file", 0]},
         "audio is linked to IMAGE, AUDIO is needed: connect the audio output of Lockstep Audio Decode or of Load Audio"),
    ],
)  # fmt: skip
def test_a_wrong_link_is_told_with_the_node_that_gives_the_right_one(
    server: ComfyUI, graph: dict, place: str, checked: str, wrong: dict, sentence: str
):
    """Under every argument of validate_inputs that is given."""
    size = {"aspect": "1:1", "width": 96, "height": 96, "seconds": 1.0, "fps": 0.0}
    kept = {"filename_prefix": "a", "disclosure": "none", "content_credentials": False}
    graph |= {
        "sampler": twin("text_to_clip")["3"],
        "empty": node("LockstepEmptyAVLatent", model=["loader", 0], **size),
        "silence": node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        "decoded": node("LockstepVAEDecode", model=["loader", 0], video=["empty", 0]),
        "encoded": node(
            "LockstepAudioEncode", model=["loader", 0], audio=["silence", 0], seconds=0.0, fps=0.0
        ),
        "saved": node("LockstepSaveClip", images=["file", 0], fps=12.0, audio=["silence", 0], **kept),
    }
    graph["sampler"]["inputs"] |= {"model": ["loader", 0], "conditioning": ["text", 0]}
    graph["out"]["inputs"]["source"] = ["held" if place == "text" else place, 0]
    del graph["out" if place == "saved" else "saved"]  # it runs what lies behind an output without fault
    graph[place]["inputs"] |= wrong
    errors = server.refuse(graph, place)
    assert {error["type"] for error in errors} == {"custom_validation_failed"}
    assert {(error["extra_info"]["input_name"], error["details"]) for error in errors} == {
        (name, f"{name} - {sentence}") for name in ("input_types", *checked.split())
    }


def test_numbers_of_other_nodes_are_taken(server: ComfyUI, graph: dict):
    graph["one"] = node("PrimitiveInt", value=0)
    graph["much"] = node("PrimitiveFloat", value=0.5)
    graph["held"]["inputs"] |= {"frame": ["one", 0], "strength": ["much", 0]}
    result = server.run(graph)
    assert result.status == "success", result.error


@pytest.mark.parametrize(("frame", "strength"), [(0, 1), (2, 1)])
def test_outputs_of_any_type_or_of_several_are_taken(server: ComfyUI, graph: dict, frame: int, strength: int):
    graph["theirs"] = node("AnotherNumber")
    graph["held"]["inputs"] |= {"frame": ["theirs", frame], "strength": ["theirs", strength]}
    result = server.run(graph)
    assert result.status == "success", result.error


def test_the_workflow_with_a_mask_takes_a_transparent_picture(server: ComfyUI, graph: dict):
    made = twin("image_nodes_before_and_after")
    (picture,) = nodes_of(made, "LoadImage")
    made[picture]["inputs"]["image"] = "half.png"
    result = server.run(made)
    assert result.status == "success", result.error
