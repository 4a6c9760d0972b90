"""Fuzzing led by coverage: bytes that reach new lines of this package are kept and changed further.

    pip install atheris && python tests/fuzz_coverage.py -runs=10000 [FOLDER]

The first byte chooses what the rest is given to: a weights header, a prompt, a size, a recipe, a picture, a clip, step
numbers, a certificate. The answer must be a value or one LockstepError. Options are those of libFuzzer; FOLDER keeps what
was found, to go on from there. Without atheris, which comes for some versions of Python and systems only, it says so.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

try:
    import atheris
except ImportError:
    sys.exit(
        "atheris is not installed here: pip install atheris, where it comes for this Python, or run tests/test_fuzz.py"
    )

with atheris.instrument_imports(include=["lockstep"]):
    from lockstep.model.checkpoint.families import describe
    from lockstep.model.checkpoint.header import read_header
    from lockstep.model.engine import Engine
    from lockstep.model.errors import LockstepError
    from lockstep.model.media import read_clip, read_image, write_clip, write_image
    from lockstep.model.provenance import Signer
    from lockstep.model.recipes import Recipe
    from lockstep.model.trajectory import Trajectory
    from lockstep.model.values import Clip

SCRATCH = Path("given")  # what a file is written to


@cache
def engine() -> Engine:
    return Engine("embedded", "cpu")


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def file(data: bytes) -> Path:
    SCRATCH.write_bytes(data)
    return SCRATCH


def weights(data: bytes) -> None:
    describe(read_header(file(len(data).to_bytes(8, "little") + data)))


TARGETS: list[Callable[[bytes], object]] = [
    weights,
    lambda data: describe(read_header(file(data))),
    lambda data: engine().tokenizer.encode(text(data)),
    lambda data: engine().shape(text(data)),
    lambda data: Recipe.from_metadata(text(data)),
    lambda data: read_image(file(data)),
    lambda data: read_clip(file(data)),
    lambda data: Trajectory(text(data), 20, lambda _: None),
    lambda data: Signer(file(data), SCRATCH),
]


def one_input(data: bytes) -> None:
    if not data:
        return
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except LockstepError as error:
        text_of = str(error).strip()
        if not 0 < len(text_of) < 4000:
            raise AssertionError("an error must be a sentence") from error


def write_seeds(folder: Path) -> None:
    """One good input for every target, to begin from."""
    write_clip(
        SCRATCH.with_name("clip.mp4"), Clip(torch.zeros(2, 16, 16, 3), torch.zeros(1, 800), 12.0, 8000)
    )
    write_image(SCRATCH.with_name("picture.png"), torch.zeros(4, 4, 3))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"config": "{}"}, "x": entry}).encode()
    pem = "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2Vw\n-----END PRIVATE KEY-----\n"
    goods = [
        header + bytes(4),
        len(header).to_bytes(8, "little") + header + bytes(4),
        b"a red ball bounces on gray",
        b"128x96",
        engine().header.metadata["recipe"].encode(),
        SCRATCH.with_name("picture.png").read_bytes(),
        SCRATCH.with_name("clip.mp4").read_bytes(),
        b"1, 5, -1",
        pem.encode(),
    ]
    for number, good in enumerate(goods):
        (folder / str(number)).write_bytes(bytes([number]) + good)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as scratch:
        SCRATCH = Path(scratch) / "given"
        seeds = Path(scratch) / "seeds"
        seeds.mkdir()
        write_seeds(seeds)
        # the library ends its process without a farewell: only this one takes away what was written
        worker = os.fork()
        if not worker:
            atheris.Setup([*sys.argv, str(seeds)], one_input)
            atheris.Fuzz()
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    sys.exit(code)
