"""The pack as ComfyUI's own tools see it: the registry's check, a shared workflow from the command line, its requirements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import ROOT, SetupError, run, set_up

pytestmark = pytest.mark.host

COMFY_CLI = "comfy-cli==1.23.0"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The command `comfy`, with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    try:
        folder = set_up() / "cli"
        command = folder / "bin" / "comfy"
        if not command.exists():
            run("create a virtual environment", set_up() / "bin" / "python", "-m", "venv", folder)
            run("install comfy-cli", folder / "bin" / "python", "-m", "pip", "install", "--quiet", COMFY_CLI)
    except SetupError as error:
        pytest.fail(f"no ComfyUI to test with: {error}")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [command, "--skip-prompt", *arguments],
            cwd=ROOT,
            env=os.environ | {"HOME": str(home), "DO_NOT_TRACK": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


def test_the_registry_finds_nothing_to_complain_about(comfy):
    done = comfy("node", "validate")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "All validation checks passed" in said
    assert "warning" not in said.lower(), said


def test_a_shared_workflow_runs_from_the_command_line(server, comfy):
    before = set((server.base / "output").rglob("*.mp4"))
    workflow = ROOT / "workflows/text_to_clip.json"
    address = ("--host", "127.0.0.1", "--port", str(server.port))
    done = comfy("--json", "run", "--workflow", workflow, *address, "--wait", "--timeout", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set((server.base / "output").rglob("*.mp4")) - before) == 1


def test_installing_the_pack_changes_no_package_of_comfyui():
    """In a ComfyUI with its own requirements, pip has nothing to do for ours."""
    try:
        python = set_up() / "bin" / "python"
    except SetupError as error:
        pytest.fail(f"no ComfyUI to test with: {error}")
    pip = ("-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--report", "-")
    report = json.loads(run("ask pip", python, *pip, "-r", ROOT / "requirements.txt"))
    assert report["install"] == []


def test_the_oldest_pyav_that_the_requirements_allow_reads_and_writes_clips(tmp_path: Path):
    """ComfyUI brings any from there on, and pip leaves it as it is."""
    oldest = next(
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("av")
    )
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", tmp_path]
    wanted = f"{oldest.replace('>=', '==')}.0"
    got = subprocess.run([sys.executable, *install, wanted], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no wheel of {wanted} for this Python: {got.stderr.splitlines()[-1]}")
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_media.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
