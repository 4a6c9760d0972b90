"""What is said of masks beside their pictures and of links between sockets, in a real ComfyUI."""

import json

import pytest
from comfyui import ROOT, ComfyUI, Listener
from PIL import Image

from lockstep.model.embedded import WEIGHTS

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
    model = "embedded" if WEIGHTS.exists() else "random.safetensors"
    return {
        "loader": node("LockstepLoader", model=model, device="auto"),
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
        with Listener(server, "masks") as listener:
            result = server.result(server.queue(graph, "masks"))
        assert result.status == "success", result.error
        return [
            text for text in listener.texts if text == "mask has nothing white: the whole picture is held"
        ]

    graph["black"] = node("SolidMask", value=0.0, width=96, height=48)
    graph["opaque"] = node("LoadImage", image="example.png")
    assert len(told(["black", 0])) == 1
    assert told(["opaque", 1]) == []


@pytest.mark.parametrize(
    ("place", "wrong", "sentence"),
    [
        ("text", {"model": ["file", 0]}, "model is linked to IMAGE, LOCKSTEP_MODEL is needed: connect the model output"),
        ("held", {"conditioning": ["loader", 0]}, "connect the conditioning output of Lockstep Text Encode"),
        ("held", {"image": ["file", 1]}, "image is linked to MASK, IMAGE is needed: connect"),
        ("held", {"mask": ["file", 0]}, "mask is linked to IMAGE, MASK is needed: connect the MASK of Load Image"),
        ("held", {"frame": ["file", 0]}, "frame is linked to IMAGE, INT is needed: type a value into the node"),
        ("decoded", {"video": ["text", 0]}, "connect a latent, such as av_latent of Lockstep Sampler"),
        ("encoded", {"audio": ["file", 0]}, "connect the audio output of Lockstep Audio Decode or of Load Audio"),
    ],
)  # fmt: skip
def test_a_wrong_link_is_told_with_the_node_that_gives_the_right_one(
    server: ComfyUI, graph: dict, place: str, wrong: dict, sentence: str
):
    size = {"aspect": "1:1", "width": 96, "height": 96, "seconds": 1.0, "fps": 0.0}
    graph |= {
        "empty": node("LockstepEmptyAVLatent", model=["loader", 0], **size),
        "silence": node("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        "decoded": node("LockstepVAEDecode", model=["loader", 0], video=["empty", 0]),
        "encoded": node(
            "LockstepAudioEncode", model=["loader", 0], audio=["silence", 0], seconds=0.0, fps=0.0
        ),
    }
    graph["out"]["inputs"]["source"] = ["held" if place == "text" else place, 0]
    graph[place]["inputs"] |= wrong
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    errors = answer["node_errors"][place]["errors"]
    assert {error["type"] for error in errors} == {"custom_validation_failed"}
    assert all(sentence in error["details"] for error in errors)


def test_numbers_of_other_nodes_are_taken(server: ComfyUI, graph: dict):
    graph["one"] = node("PrimitiveInt", value=0)
    graph["much"] = node("PrimitiveFloat", value=0.5)
    graph["held"]["inputs"] |= {"frame": ["one", 0], "strength": ["much", 0]}
    result = server.run(graph)
    assert result.status == "success", result.error


def test_the_workflow_with_a_mask_takes_a_transparent_picture(server: ComfyUI, graph: dict):
    made = json.loads((ROOT / "tests/host/api/image_nodes_before_and_after.json").read_text(encoding="utf-8"))
    for step in made.values():
        if step["class_type"] == "LoadImage":
            step["inputs"]["image"] = "half.png"
        if step["class_type"] == "LockstepSampler":
            step["inputs"] |= {"steps": 2, "seconds": 1.0}
        if step["class_type"] == "LockstepLoader":
            step["inputs"]["model"] = graph["loader"]["inputs"]["model"]
    result = server.run(made)
    assert result.status == "success", result.error
