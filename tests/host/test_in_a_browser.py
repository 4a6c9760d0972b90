"""The pack in ComfyUI's own page: every workflow opens without complaint and sends what its twin says; one is run.

Needs Chromium and node; playwright-core is fetched from the package index beside the ComfyUI that is tested.
Without them all is skipped, or fails where LOCKSTEP_BROWSER=required says that they are there.
LOCKSTEP_FREEZE=1 writes the README's screenshot and the pictures of the help pages.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from comfyui import ROOT, VERSION, SetupError, run, set_up
from PIL import Image

from lockstep.model.media import write_clip
from lockstep.model.provenance import Disclosure
from lockstep.model.values import Clip

pytestmark = pytest.mark.host

HERE = Path(__file__).parent
FREEZE = bool(os.environ.get("LOCKSTEP_FREEZE"))
PLAYWRIGHT = "playwright-core@1.65.1"
PLAYERS = ("audioUI", "video-preview")  # of the page's own, sent along with what they play
SCHEMA = json.loads((HERE / "object_info.json").read_text(encoding="utf-8"))
OURS = sorted(name for name in SCHEMA if name.startswith("Lockstep"))
WORKFLOWS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "workflows").glob("*.json")
}


@pytest.fixture(scope="module")
def seen(server, tmp_path_factory) -> dict:
    """What the page showed."""
    folder = tmp_path_factory.mktemp("browser")
    try:
        chromium, node, playwright = find_browser()
    except SetupError as error:
        if os.environ.get("LOCKSTEP_BROWSER") == "required":
            pytest.fail(f"LOCKSTEP_BROWSER=required, but {error}")
        pytest.skip(str(error))
    workflows = [{"name": name, "content": content} for name, content in sorted(WORKFLOWS.items())]
    task = {
        "server": f"http://127.0.0.1:{server.port}",
        "chromium": chromium,
        "playwright": str(playwright),
        "workflows": workflows,
        "run": "text_to_clip",
        "screenshot": str(ROOT / "web/screenshot.jpg" if FREEZE else folder / "screenshot.jpg"),
        "dropped": base64.b64encode(clip_with(WORKFLOWS["save_clip"], folder / "clip.mp4")).decode(),
        "nodes": OURS,
        "pictures": str(ROOT / "web/docs") if FREEZE else None,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    done = subprocess.run(
        [node, HERE / "browser.mjs", folder / "task.json"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"screenshot": task["screenshot"]}


def clip_with(workflow: dict, path: Path) -> bytes:
    """A file as Lockstep Save Clip writes it."""
    clip = Clip(torch.zeros(3, 32, 32, 3), torch.zeros(1, 4000), 12.0, 16000)
    write_clip(path, clip, {"workflow": json.dumps(workflow)}, Disclosure())
    return path.read_bytes()


def find_browser() -> tuple[str, str, Path]:
    """Chromium, node and the folder in which playwright-core lies. Raises SetupError if one cannot be had."""
    chromium = first_that_starts("chromium", "chromium-browser", "google-chrome")
    node, npm = first_that_starts("node"), first_that_starts("npm")
    if not chromium or not node or not npm:
        raise SetupError("no Chromium, node or npm here that starts: apt-get install chromium nodejs npm")
    folder = set_up() / "browser"
    if not (folder / "node_modules" / "playwright-core").exists():
        folder.mkdir(exist_ok=True)
        run(
            "install playwright-core",
            npm,
            "install",
            "--prefix",
            folder,
            "--no-audit",
            "--no-fund",
            PLAYWRIGHT,
        )
    return chromium, node, folder


def first_that_starts(*names: str) -> str | None:
    """Some systems have a command of a browser's name which only tells how to install it; .ci/run asks the same."""
    programs = filter(None, map(shutil.which, names))
    return next((program for program in programs if starts(program)), None)


def starts(program: str) -> bool:
    return subprocess.run([program, "--version"], capture_output=True).returncode == 0


def published_files(workflow: dict) -> set[str]:
    """Those that it names with an address: chosen in a node, or needed beside them."""
    chosen = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    return {model["name"] for model in (*chosen, *workflow.get("models", []))}


def test_workflows_with_published_weights_name_all_of_their_files():
    assert {
        name: len(published_files(workflow)) for name, workflow in WORKFLOWS.items() if "ltx" in name
    } == {
        "ltx_one_stage": 2,
        "ltx_two_stage": 4,
        "ltx_lora": 3,
    }


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_opens_without_complaint_and_is_what_its_twin_says(seen: dict, server, name: str):
    """Published files that are missing, and those alone, are offered for download."""
    opened = seen["opened"][name]
    pinned = server.version == VERSION  # others have core nodes of their own, and offer files elsewhere
    named = {file: list((server.base / "models").rglob(file)) for file in published_files(WORKFLOWS[name])}
    missing = any(not found for found in named.values())
    if pinned:
        assert len(opened["complaints"]) == missing
        for file, found in named.items():
            assert (file in opened["complaints"][0]) != bool(found)
    assert opened["broken"] == [] or (missing and not pinned)  # they mark the node that names a missing file

    def counts(node: dict) -> bool:
        return pinned or node["class_type"].startswith("Lockstep")

    sent = {
        number: {
            "class_type": node["class_type"],
            "inputs": {name: value for name, value in node["inputs"].items() if name not in PLAYERS},
        }
        for number, node in opened["output"].items()
        if counts(node)
    }
    wanted = json.loads((HERE / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert sent == {number: node for number, node in wanted.items() if counts(node)}


def test_a_press_of_run_makes_a_clip_and_previews_on_the_way(seen: dict):
    heard = seen["ran"]["heard"]
    assert heard.get("execution_success") == 1
    assert heard["progress"] >= 20
    assert heard["b_preview_with_metadata"] >= 2
    assert any(output.get("animated") for output in seen["ran"]["outputs"].values())
    picture = Image.open(seen["screenshot"])
    assert picture.size == (1600, 900)
    assert len(picture.resize((160, 90)).convert("L").getcolors()) > 50  # something was drawn
    assert not seen["ran"]["news"]  # nothing of the page's own lies over it


def test_a_saved_clip_that_is_dropped_on_the_page_opens_its_workflow(seen: dict):
    assert seen["dropped"] == sorted(node["type"] for node in WORKFLOWS["save_clip"]["nodes"])


def test_the_model_s_socket_has_its_colour(seen: dict):
    assert seen["ran"]["color"] == seen["ran"]["style"] == "#e8a33d"


def test_dates_and_values_of_nodes_are_put_into_a_file_s_name(seen: dict):
    year, seed = seen["named"].split("/")
    assert 2024 <= int(year) <= 9999
    assert seed == "7"


def test_the_page_throws_no_error(seen: dict):
    assert seen["errors"] == []


@pytest.mark.parametrize("node", OURS)
def test_a_help_page_comes_with_its_picture(seen: dict, node: str):
    assert seen["helped"][node]["title"] == f"# {SCHEMA[node]['display_name']}"
    assert seen["helped"][node]["widths"]
    assert all(seen["helped"][node]["widths"])
