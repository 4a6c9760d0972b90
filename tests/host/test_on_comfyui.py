"""The nodes in a real ComfyUI: what it shows of them, what they make, how they fail, what they leave behind."""

import io
import json
import os
import time
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import av
import pytest
from comfyui import PACK, ROOT, ComfyUI, Listener, SetupError, serve, set_up
from PIL import Image
from random_model import write_random_model

from lockstep.model.embedded import WEIGHTS

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
SCHEMA = HERE / "object_info.json"
CORE = ("CreateVideo", "LoadImage", "SaveVideo")  # those that the workflows use
STEPS = 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_random_model(checkpoints / "random.safetensors")
    (checkpoints / "damaged.safetensors").write_bytes(b"no weights at all")
    try:
        with serve(set_up(), base) as running:
            yield running
    except SetupError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def graph() -> dict:
    """Text to a clip of 13 frames in two steps, on the shipped weights where they are."""
    return twin("text_to_clip")


def twin(name: str) -> dict:
    made = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    for node in made.values():
        if node["class_type"] == "LockstepLoader" and not WEIGHTS.exists():
            node["inputs"]["model"] = "random.safetensors"
        if node["class_type"] == "LockstepSampler":
            node["inputs"] |= {"steps": STEPS, "seconds": 1.0}
    return made


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
    seen["LoadImage"]["input"]["required"]["image"][0] = ["example.png"]
    text = json.dumps(seen, indent=1) + "\n"
    if os.environ.get("LOCKSTEP_FREEZE"):
        SCHEMA.write_text(text, encoding="utf-8")
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == seen, "if meant, run once with LOCKSTEP_FREEZE=1"


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
        assert (picture.width, picture.height, picture.average_rate) == (64, 64, Fraction(12))
        frames = sum(1 for _ in container.decode(picture))
    with av.open(str(clip)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        rate = container.streams.audio[0].rate
    assert frames == 25
    assert sound.codec_context.name == "aac"
    # AAC comes in blocks of 1024 samples and may begin with one of its own
    assert abs(samples / rate - frames / 12) <= 2 * 1024 / rate


def test_an_image_becomes_a_clip(server: ComfyUI):
    clip = server.clip_of(server.run(twin("image_to_clip")))
    with av.open(str(clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 13


def test_first_and_last_image_and_another_aspect(server: ComfyUI):
    graph = twin("image_to_clip")
    graph["10"] = {
        "class_type": "LockstepImageEncode",
        "inputs": {"conditioning": ["4", 0], "image": ["3", 0], "frame": -1, "strength": 0.8},
    }
    graph["5"]["inputs"] |= {"conditioning": ["10", 0], "aspect": "16:9", "fps": 16.0}
    clip = server.clip_of(server.run(graph))
    with av.open(str(clip)) as container:
        picture = container.streams.video[0]
        assert (picture.width, picture.height, picture.average_rate) == (112, 64, Fraction(16))
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


def test_a_seed_means_the_same_twice(server: ComfyUI, graph: dict):
    def pictures(seed: int) -> bytes:
        with av.open(str(server.clip_of(server.run(with_seed(graph, seed))))) as container:
            return b"".join(frame.to_ndarray().tobytes() for frame in container.decode(video=0))

    first, other = pictures(21), pictures(22)
    assert pictures(21) == first != other


def test_progress_and_previews_arrive(server: ComfyUI, graph: dict):
    with Listener(server, "watcher") as listener:
        server.result(server.queue(with_seed(graph, 31), "watcher"))
        listener.wait_for("execution_success")
        assert any("took" in text for text in listener.texts)
    steps = {(data["value"], data["max"]) for name, data in listener.events if name == "progress"}
    assert {(step + 1, STEPS) for step in range(STEPS)} <= steps
    assert listener.previews
    assert Image.open(io.BytesIO(listener.previews[0])).size == (512, 512)  # the host enlarges what it sends


def test_unknown_words_are_named_on_the_node(server: ComfyUI, graph: dict):
    graph["2"]["inputs"]["prompt"] = "a red ball bounces on zorbly gray"
    with Listener(server, "reader") as listener:
        server.result(server.queue(graph, "reader"))
        listener.wait_for("execution_success")
    assert any("zorbly" in text for text in listener.texts)


def test_ten_runs_take_no_more_memory_than_three(server: ComfyUI, graph: dict):
    sizes = []
    for seed in range(100, 110):
        assert server.run(with_seed(graph, seed)).status == "success"
        sizes.append(server.resident_bytes)
    # allocators settle in the first runs; one clip of 13 frames is 0.6 MB
    assert sizes[-1] < sizes[2] * 1.02


# How they fail


@pytest.mark.parametrize(
    ("node", "wrong", "sentence"),
    [
        ("1", {"model": "no-such.safetensors"}, "no model file 'no-such.safetensors'"),
        ("1", {"model": "damaged.safetensors"}, "damaged.safetensors"),
        ("1", {"device": "abacus"}, "use auto or cpu"),
        ("2", {"prompt": "  "}, "prompt is empty"),
        ("3", {"aspect": "1:7"}, "use model default"),
        ("3", {"sampler": "magic"}, "use euler"),
        ("3", {"steps": -1}, "steps"),
        ("3", {"conditioning": ["1", 0]}, "CONDITIONING"),
        ("4", {"video": ["2", 0]}, "LATENT"),
    ],
)
def test_wrong_values_are_refused_before_the_run(server: ComfyUI, graph: dict, node, wrong, sentence):
    graph[node]["inputs"] |= wrong
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400
    assert sentence in json.dumps(answer["node_errors"][node], ensure_ascii=False)


@pytest.mark.parametrize(
    ("node", "wrong", "sentence"),
    [
        ("2", {"prompt": "xyzzy plugh"}, "it knows"),
        ("3", {"seconds": 90.0}, "use 4.2"),
        ("3", {"fps": 5.0}, "use 12"),
        ("3", {"aspect": "custom", "width": 80, "height": 1024}, "use 112"),
        ("4", {"video": ["empty", 0]}, "not made by a Lockstep Sampler"),
        ("4", {"video": ["3", 1]}, "connect the sampler's video output"),
        ("5", {"audio": ["3", 0]}, "connect the sampler's audio output"),
        ("3", {"conditioning": ["zeroed", 0]}, "changed by a node in between"),
        ("3", {"conditioning": ["both", 0]}, "holds 2 prompts"),
        ("3", {"conditioning": ["batch", 0]}, "holds 2 pictures"),
        ("3", {"conditioning": ["late", 0]}, "use 0 to 12"),
        ("3", {"conditioning": ["twice", 0]}, "two guides at frame 0"),
    ],
)
def test_what_shows_only_in_the_run_is_told_in_one_sentence(
    server: ComfyUI, graph: dict, node, wrong, sentence
):
    graph |= spare_nodes()  # only those that the saved clip depends on are run
    graph[node]["inputs"] |= wrong
    result = server.run(graph)
    assert result.status == "error"
    assert sentence in result.error
    assert "\n" not in result.error


def spare_nodes() -> dict:
    def image_encode(text: str, image: str, frame: int) -> dict:
        inputs = {"conditioning": [text, 0], "image": [image, 0], "frame": frame, "strength": 1.0}
        return {"class_type": "LockstepImageEncode", "inputs": inputs}

    def empty_image(batch: int) -> dict:
        return {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": batch, "color": 0},
        }

    both = {"conditioning_1": ["2", 0], "conditioning_2": ["2", 0]}
    size = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    return {
        "empty": {"class_type": "EmptyLTXVLatentVideo", "inputs": size},
        "zeroed": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
        "both": {"class_type": "ConditioningCombine", "inputs": both},
        "one": empty_image(1),
        "two": empty_image(2),
        "batch": image_encode("2", "two", 0),
        "late": image_encode("2", "one", 25),
        "start": image_encode("2", "one", 0),
        "twice": image_encode("start", "one", 0),
    }


def test_interrupt_stops_within_a_step_and_the_next_run_works(server: ComfyUI, graph: dict):
    long = with_seed(graph, 41)
    long["3"]["inputs"]["steps"] = 1000
    with Listener(server, "stopper") as listener:
        prompt_id = server.queue(long, "stopper")
        listener.wait_for("progress", max=1000)
        server.post("/interrupt", {"prompt_id": prompt_id})
        result = server.result(prompt_id, seconds=30)
    assert "execution_interrupted" in result.messages
    assert server.run(with_seed(graph, 42)).status == "success"


def free(server: ComfyUI, **what: bool) -> None:
    server.post("/free", what)
    time.sleep(2)  # done by the worker when it next looks, and told nowhere


def test_freed_models_come_back(server: ComfyUI, graph: dict):
    server.run(with_seed(graph, 51))
    before = loads(server)
    free(server, unload_models=True)
    assert server.run(with_seed(graph, 52)).status == "success"
    assert loads(server) == before  # moved away and back, not read again
    free(server, unload_models=True, free_memory=True)
    assert server.run(with_seed(graph, 52)).status == "success"
    assert loads(server) == before + 6  # nothing held them any longer
    assert "memory leak" not in server.log
