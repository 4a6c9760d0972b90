"""Trains the embedded model from nothing, stage by stage; every stage resumes where its folder stands.

python -m lockstep.model.embedded.train video       RUNS --steps 7500
python -m lockstep.model.embedded.train audio       RUNS --steps 1500
python -m lockstep.model.embedded.train vocoder     RUNS --steps 8000   # after the audio codec
python -m lockstep.model.embedded.train decoder     RUNS --steps 500    # if wanted: the video decoder alone, latents stay
python -m lockstep.model.embedded.train shards      RUNS --steps 200
python -m lockstep.model.embedded.train transformer RUNS --steps 30000
python -m lockstep.model.embedded.train check       RUNS          # what each stage has learned so far
python -m lockstep.model.embedded.train pack        RUNS          # in place of the shipped file; --file OUT writes another

`unpack RUNS` starts all runs from the shipped file instead; `move RUNS --file FILE` the transformer's alone, from that of a packed
file whose video codec was another one.

Steps count from a run's beginning, and so do the --seconds after which a stage ends by the clock, with or without --steps.
On a GPU --batch and --workers make use of it; on several, torchrun spreads the transformer's batches.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..codec.audio_vae import AudioVAE, AudioVAEConfig
from ..codec.mel import LogMel
from ..codec.video_vae import VideoVAE, VideoVAEConfig
from ..errors import TrainingError
from . import WEIGHTS, config
from .check import errors_beside, restored_pictures, restored_sounds, sought_magnitudes
from .dataset import check_shards, encode_shards, format_of, hash_of_codecs
from .moving import rotation_between, turned
from .pack import pack, unpack
from .train_audio import initialise_audio_vae, measure_audio_statistics, train_audio_vae
from .train_transformer import Generator, initialise_generator, shards_in, train_transformer
from .train_video_vae import initialise, measure_statistics, train_video_decoder, train_video_vae
from .train_vocoder import new_vocoder, train_vocoder
from .training import (
    Run,
    TrainSettings,
    averaged_state,
    check_data,
    is_run,
    last_logged,
    refuse_over,
    save_start,
)

_ENDLESS = 10**9  # steps that no run comes to


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=list(_STAGES))
    parser.add_argument("runs", type=Path, help="folder that holds one folder per stage")
    parser.add_argument(
        "--steps", type=int, default=0, help="training steps, from the run's beginning, or shards to encode"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="clips in a step (default: what suits two cores)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="end after so long at latest, all starts of the run together, fully decayed; needs no --steps",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes ahead, for a GPU")
    parser.add_argument(
        "--file",
        type=Path,
        help="packed file: whose transformer is moved to the codec in RUNS, or to pack into",
    )
    parser.add_argument("--first", type=int, default=0, help="first shard to encode")
    given = parser.parse_args()
    if fault := _fault(given):
        parser.error(fault)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.seconds and not given.steps:
        given.steps = _ENDLESS
    given.device = _own_device(given.device)
    try:
        _STAGES[given.stage](given)
    except TrainingError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _fault(given: argparse.Namespace) -> str:
    """What is wrong with options that do not go together, or nothing."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and given.stage != "transformer":
        return "torchrun spreads the batches of the transformer alone: run this stage without it"
    if several and given.seconds:
        return "--seconds would end each of torchrun's processes at another step: give --steps"
    if given.stage in _TRAINED and not (given.steps or given.seconds):
        return "how long is to be trained? give --steps or --seconds"
    if given.stage == "shards" and not given.steps:
        return "how many shards are to be encoded? give --steps"
    if given.stage == "move" and not given.file:
        return "move needs --file: the packed file whose transformer is moved"
    for option, stages in _OPTIONS.items():
        if getattr(given, option) and given.stage not in stages:
            return f"--{option} is for {', '.join(stages)}, not for {given.stage}"
    return ""


def _own_device(device: str) -> str:
    """The GPU of this process where torchrun started several, else the device as it was given."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    own = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(own)
    return own


def _how(given: argparse.Namespace) -> dict:
    """The options of every trained stage, as its function wants them."""
    return {"workers": given.workers, "seconds": given.seconds} | (
        {"batch": given.batch} if given.batch else {}
    )


def _video(given: argparse.Namespace) -> None:
    vae = VideoVAE(VideoVAEConfig.from_published(config.VIDEO_VAE))
    initialise(vae, seed=0)
    settings = TrainSettings(given.steps, learning_rate=1e-3, warmup_steps=50, ema_decay=0.995)
    run = Run(given.runs / "video", vae.to(given.device), settings)
    train_video_vae(run, given.device, **_how(given))


def _decoder(given: argparse.Namespace) -> None:
    vae = VideoVAE(VideoVAEConfig.from_published(config.VIDEO_VAE))
    vae.load_state_dict(averaged_state(given.runs / "video"))
    vae.encoder.requires_grad_(False)
    _check_decoder(given.runs)
    settings = TrainSettings(
        given.steps, learning_rate=5e-4, matrix_rate=0.008, warmup_steps=50, ema_decay=0.995
    )
    run = Run(given.runs / "decoder", vae.to(given.device), settings)
    train_video_decoder(run, given.device, **_how(given))


def _audio(given: argparse.Namespace) -> None:
    vae = AudioVAE(AudioVAEConfig.from_published(config.AUDIO_VAE))
    initialise_audio_vae(vae, seed=0)
    settings = TrainSettings(given.steps, warmup_steps=50, ema_decay=0.99)
    run = Run(given.runs / "audio", vae.to(given.device), settings)
    train_audio_vae(run, given.device, **_how(given))


def _vocoder(given: argparse.Namespace) -> None:
    vae = _trained_audio_vae(given.runs, given.device)
    settings = TrainSettings(given.steps, learning_rate=2e-3, warmup_steps=50, ema_decay=0.998)
    run = Run(given.runs / "vocoder", new_vocoder(LogMel(vae.config.mel), seed=0).to(given.device), settings)
    train_vocoder(run, vae, given.device, **_how(given))


def _shards(given: argparse.Namespace) -> None:
    _check_shards(given.runs)  # before statistics are measured, which takes a while
    shards = range(given.first, given.first + given.steps)
    codecs = (finished_video_vae(given.runs, given.device), finished_audio_vae(given.runs, given.device))
    started = time.monotonic()

    def done(index: int) -> None:
        line = {"shard": index, "format": format_of(index), "seconds": round(time.monotonic() - started, 1)}
        print(json.dumps(line), flush=True)

    encode_shards(given.runs / "shards", shards, *codecs, given.device, given.workers, done=done)


def _hash_of_codecs(runs: Path) -> str:
    return hash_of_codecs(averaged_state(runs / "video"), averaged_state(runs / "audio"))


def _check_shards(runs: Path) -> str:
    """The hash of the codecs, once all shards are known to be of them."""
    codecs = _hash_of_codecs(runs)
    check_shards(runs / "shards", codecs)
    return codecs


def _check_decoder(runs: Path) -> None:
    """Raises TrainingError if there is a decoder that was polished for another encoder than that of these runs."""
    if not is_run(runs / "decoder"):
        return
    polished, video = averaged_state(runs / "decoder"), averaged_state(runs / "video")
    if any(not torch.equal(polished[name], video[name]) for name in video if name.startswith("encoder.")):
        raise TrainingError(
            f"{runs / 'decoder'} was polished for another video codec than that in {runs / 'video'}: "
            "move it away, and polish again if you like"
        )


def _transformer(given: argparse.Namespace) -> None:
    codecs = _check_shards(given.runs)
    model = Generator()
    initialise_generator(model, seed=0)
    settings = TrainSettings(
        given.steps, learning_rate=1e-3, matrix_rate=0.02, warmup_steps=100, ema_decay=0.998
    )
    run = Run(given.runs / "transformer", model.to(given.device), settings, codecs)
    train_transformer(run, given.runs / "shards", given.device, **_how(given))


def _check(given: argparse.Namespace) -> None:
    runs, device = given.runs, given.device
    trained = [stage for stage in ("video", "audio", "vocoder", "transformer") if is_run(runs / stage)]
    if not trained:
        raise TrainingError(f"{runs} holds no run: train video first")
    for stage in trained:
        steps = {"step": last_logged(runs / stage)["step"]}
        if stage == "video" and is_run(runs / "decoder"):
            steps["decoder_step"] = last_logged(runs / "decoder")["step"]
        for line in _CHECKS[stage](runs, device):
            figures = {name: round(value, 4) for name, value in line.items()}
            print(json.dumps({"stage": stage} | steps | figures), flush=True)


def _check_transformer(runs: Path, device: str) -> Iterator[dict[str, float]]:
    codecs, folder = _check_shards(runs), runs / "transformer"
    model = Generator()
    model.load_state_dict(averaged_state(folder))
    check_data(folder, codecs)
    return errors_beside(model.to(device), shards_in(runs / "shards"), device)


def _check_vocoder(runs: Path, device: str) -> Iterator[dict[str, float]]:
    vae = _trained_audio_vae(runs, device)
    vocoder = new_vocoder(LogMel(vae.config.mel), seed=0)
    vocoder.load_state_dict(averaged_state(runs / "vocoder"))
    yield sought_magnitudes(vocoder.to(device), vae, device)


def _pack(given: argparse.Namespace) -> None:
    states = {
        "video": finished_video_vae(given.runs).state_dict(),
        "audio": finished_audio_vae(given.runs).state_dict(),
        "vocoder": averaged_state(given.runs / "vocoder"),
        "generator": averaged_state(given.runs / "transformer"),
    }
    check_data(given.runs / "transformer", _hash_of_codecs(given.runs))
    record = {stage: last_logged(given.runs / stage) for stage in _TRAINED}
    packed = given.file or WEIGHTS
    pack(states, record, packed)
    print(f"{packed}: {packed.stat().st_size / 1e6:.2f} MB")


def _unpack(given: argparse.Namespace) -> None:
    refuse_over(*(given.runs / stage for stage in _TRAINED))
    states, record = unpack(WEIGHTS)
    codecs = hash_of_codecs(states["video"], states["audio"])
    for stage, state in states.items():
        save_start(given.runs / stage, state, record[stage], codecs if stage == "transformer" else "")


def _move(given: argparse.Namespace) -> None:
    refuse_over(given.runs / "transformer")
    states, record = unpack(given.file)
    old = VideoVAE(VideoVAEConfig.from_published(config.VIDEO_VAE))
    old.load_state_dict(states["video"])
    new = finished_video_vae(given.runs, given.device)
    turn, unlike = rotation_between(new, old.to(given.device).eval())
    moved, codecs = turned(states["transformer"], turn), hash_of_codecs(new.state_dict(), states["audio"])
    save_start(given.runs / "transformer", moved, record["transformer"], codecs)
    print(f"moved; the rotation leaves {unlike:.0%} of the latents' power unlike: train on")


def finished_video_vae(runs: Path, device: str = "cpu") -> VideoVAE:
    """The trained video VAE with measured statistics."""
    vae = _trained_video_vae(runs, device)
    measure_statistics(vae)
    return vae


def finished_audio_vae(runs: Path, device: str = "cpu") -> AudioVAE:
    """The trained audio VAE with measured statistics."""
    vae = _trained_audio_vae(runs, device)
    measure_audio_statistics(vae)
    return vae


def _trained_video_vae(runs: Path, device: str) -> VideoVAE:
    vae = VideoVAE(VideoVAEConfig.from_published(config.VIDEO_VAE)).to(device)
    vae.load_state_dict(averaged_state(runs / "video"))
    _check_decoder(runs)
    if is_run(runs / "decoder"):
        polished = averaged_state(runs / "decoder")
        vae.load_state_dict({k: v for k, v in polished.items() if k.startswith("decoder.")}, strict=False)
    return vae.eval().requires_grad_(False)


def _trained_audio_vae(runs: Path, device: str) -> AudioVAE:
    vae = AudioVAE(AudioVAEConfig.from_published(config.AUDIO_VAE)).to(device)
    vae.load_state_dict(averaged_state(runs / "audio"))
    return vae.eval().requires_grad_(False)


_TRAINED = ("video", "decoder", "audio", "vocoder", "transformer")
# what only some stages take
_OPTIONS = {
    "steps": (*_TRAINED, "shards"),
    "batch": _TRAINED,
    "seconds": _TRAINED,
    "workers": (*_TRAINED, "shards"),
    "first": ("shards",),
    "file": ("move", "pack"),
}
_CHECKS = {
    "video": lambda runs, device: [restored_pictures(_trained_video_vae(runs, device), device)],
    "audio": lambda runs, device: [restored_sounds(_trained_audio_vae(runs, device), device)],
    "vocoder": _check_vocoder,
    "transformer": _check_transformer,
}
_STAGES = {
    "video": _video,
    "decoder": _decoder,
    "audio": _audio,
    "vocoder": _vocoder,
    "shards": _shards,
    "transformer": _transformer,
    "check": _check,
    "pack": _pack,
    "unpack": _unpack,
    "move": _move,
}

if __name__ == "__main__":
    main()
