"""Recorded passes give what passes give, bit for bit, and only where they may be recorded.

No CUDA graph runs here: `Recorded` keeps what a graph keeps, the operations and the tensors that they read and write, and
does the same operations again on the same tensors. So whatever a graph would read too old, too new or from a step that
is gone is read here as well. The graphs themselves are tested in test_cuda.py.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import av_names  # noqa: F401  # before the engine, which needs them
import pytest
import torch
from test_sharing import PASSES, SHAPE, make, tokens
from tiny_models import TRANSFORMERS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.model.conditioning.layout import lay_out_audio, lay_out_video
from lockstep.model.denoiser import JointDenoiser
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.transformer import compiled
from lockstep.model.transformer.compiled import CompileReport
from lockstep.model.transformer.graphs import LEAST_STEPS, CudaRecorder, Pass, Recording, Velocities, Wait
from lockstep.model.transformer.step_cache import StepCache
from lockstep.model.values import Guide

SIGMAS = tuple(1 - step / 8 for step in range(8))
STG = (2,)


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorded(TorchDispatchMode):
    """The operations of one pass, to be done again; until then nothing is in what they made."""

    def __init__(self):
        super().__init__()
        self._done: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors((args, kwargs))}
        fresh = [(place, x) for place, x in enumerate(tensors(made)) if storage(x) not in given]
        # what only looks at memory in another way still looks at the same
        if fresh or func._schema.is_mutable:
            self._done.append((func, args, kwargs or {}, fresh))
        return made

    def forget_values(self) -> None:
        for *_, fresh in self._done:
            for _, tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def again(self) -> None:
        for func, args, kwargs, fresh in self._done:
            new = tensors(func(*args, **kwargs))
            for place, kept in fresh:
                kept.copy_(new[place])


class Recorder:
    """Counts what it records; fails at the recordings numbered in `fails`."""

    def __init__(self, fails: tuple[int, ...] = ()):
        self.recorded, self.replayed, self._fails = 0, 0, fails  # numbered from 1

    def __call__(self, run: Pass) -> Pass:
        self.recorded += 1
        with Recorded() as record:
            made = run()
            if self.recorded in self._fails:
                raise RuntimeError("operation not permitted when stream is capturing\nand a traceback of C++")
        record.forget_values()

        def again() -> Velocities:
            self.replayed += 1
            record.again()
            return made

        return again


def pair(name: str, passes: tuple[str, ...] = PASSES, fails: tuple[int, ...] = (), guides=(), **options):
    """A recorder, the denoiser that uses it, and one without."""
    recorder = Recorder(fails)
    plain = make(name, STG, passes, guides, **options)
    return recorder, replace(plain, recording=Recording(lambda: recorder)), plain


def assert_runs_agree(
    recording: JointDenoiser,
    plain: JointDenoiser,
    passes: Callable[[int], tuple[str, ...]] = lambda _step: PASSES,
    sigmas: tuple[float, ...] = SIGMAS,
) -> None:
    """Bit for bit: what is recorded are the same operations."""
    for denoiser in (recording, plain):
        denoiser.tabulate(sigmas)
    for step, sigma in enumerate(sigmas):
        given = [x.to(next(plain.transformer.parameters()).device) for x in tokens(plain, step)]
        for name in passes(step):
            made, wanted = recording(*given, sigma, name), plain(*given, sigma, name)
            for stream, own, other in zip(("video", "audio"), made, wanted, strict=True):
                assert torch.equal(own, other), f"step {step}, {name}, {stream}"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recorded_passes_are_those_that_run(name):
    recorder, recording, plain = pair(name)
    assert_runs_agree(recording, plain)
    assert (recorder.recorded, recorder.replayed) == (4, 4 * (len(SIGMAS) - 1))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_run_without_guidance_is_recorded(name):
    recorder, recording, plain = pair(name, ("cond",))
    assert_runs_agree(recording, plain, lambda _step: ("cond",))
    assert (recorder.recorded, recorder.replayed) == (1, len(SIGMAS) - 1)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_guidance_may_end_early_and_passes_may_come_late(name):
    recorder, recording, plain = pair(name)
    assert_runs_agree(recording, plain, lambda step: PASSES if step < 4 else ("cond",))
    assert recorder.recorded == 4
    recorder, recording, plain = pair(name)
    assert_runs_agree(recording, plain, lambda step: PASSES if step in (3, 4, 6) else ("cond", "uncond"))
    assert recorder.recorded == 4


@pytest.mark.parametrize("name", ["2.3", "2.5"])
def test_a_first_image_and_one_beside_the_clip_are_recorded(name):
    picture = torch.randn(1, 4, 1, 2, 3)
    recorder, recording, plain = pair(
        name, guides=(Guide(picture, 0, 0.7), Guide(picture, 8, 1.0, attention=0.5))
    )
    assert len(plain.video.masks) > 1
    assert_runs_agree(recording, plain)
    assert recorder.recorded == 4


@pytest.mark.parametrize("options", [{"apart": True}, {"text_memory_bytes": 0}])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_streams_apart_and_texts_that_are_not_kept_are_recorded(name, options):
    recorder, recording, plain = pair(name, ("cond", "uncond"), **options)
    assert_runs_agree(recording, plain, lambda _step: ("cond", "uncond"))
    assert recorder.recorded == 2


def test_a_sound_whose_pictures_are_given_is_recorded():
    recorder, recording, plain = pair("2.3")
    shape = plain.video.clean.shape
    video = lay_out_video(SHAPE, shape[2], (), torch.randn(1, 4, 3, 2, 3))
    assert_runs_agree(replace(recording, video=video), replace(plain, video=video))
    assert recorder.recorded == 4
    recorder, recording, plain = pair("2.3", ("cond", "uncond"))
    alone = SHAPE.sound_alone()
    layouts = {"video": lay_out_video(alone, 4, ()), "audio": lay_out_audio(alone, 2, 8)}
    recording, plain = (replace(denoiser, apart=True, **layouts) for denoiser in (recording, plain))
    assert_runs_agree(recording, plain, lambda _step: ("cond", "uncond"))
    assert recorder.recorded == 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_level_or_a_pass_may_come_again_and_in_another_order(name):
    recorder, recording, plain = pair(name)
    for denoiser in (recording, plain):
        denoiser.tabulate(SIGMAS)
    orders = (
        PASSES,
        PASSES,
        ("cond", "cond", "isolated", "perturbed"),
        ("uncond", "cond"),
        ("perturbed",),
        PASSES,
    )
    for step, order in enumerate(orders):
        given = tokens(plain, step)
        for name_of_pass in order:  # at the same level in all steps
            made, wanted = recording(*given, 0.5, name_of_pass), plain(*given, 0.5, name_of_pass)
            assert torch.equal(made[0], wanted[0]), f"step {step}, {name_of_pass}"
            assert torch.equal(made[1], wanted[1]), f"step {step}, {name_of_pass}"
    assert recorder.recorded == 4


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_recording_that_fails_is_told_once_and_the_run_goes_on(name, fails, caplog):
    recorder, recording, plain = pair(name, fails=(fails,))
    assert_runs_agree(recording, plain)
    assert recorder.recorded == fails
    assert recorder.replayed == fails - 1
    told = [line for line in caplog.messages if "CUDA graphs" in line]
    assert told == [
        "passes could not be recorded as CUDA graphs, and go on without: operation not permitted when stream is capturing"
    ]


def test_what_is_given_out_is_not_overwritten_by_the_next_step():
    _, recording, plain = pair("2.3")
    recording.tabulate(SIGMAS)
    made = [recording(*tokens(plain, step), sigma, "cond")[0] for step, sigma in enumerate(SIGMAS)]
    wanted = [plain(*tokens(plain, step), sigma, "cond")[0] for step, sigma in enumerate(SIGMAS)]
    assert all(map(torch.equal, made, wanted))


def test_a_pass_that_compiled_something_is_run_again_before_it_is_recorded():
    recorder, recording, plain = pair("2.3", ("cond", "uncond"))
    counts = iter((0, 1, 1, 2))  # before and behind both passes of the first step
    recording = replace(recording, recording=Recording(lambda: recorder, lambda: next(counts, 2)))
    recorded = []

    def passes(_step: int) -> tuple[str, ...]:
        recorded.append(recorder.recorded)
        return "cond", "uncond"

    assert_runs_agree(recording, plain, passes)
    assert recorded[:4] == [0, 0, 0, 2]


class Noticed:
    """In place of a GPU's: what is noticed of each run, in turn."""

    def __init__(self, noticed: list[bool]):
        self._left = noticed

    def __call__(self, _transformer: nn.Module) -> "Noticed":
        return self

    def __enter__(self) -> "Noticed":
        return self

    def __exit__(self, *_error: object) -> None:
        self.noticed = self._left.pop(0)


def test_passes_are_recorded_once_a_gpu_waits_for_the_host_in_all_of_them_but_never_after_their_first_run():
    # by step, for "cond" and "uncond"
    for noticed, first in (([True, True] * 2, 2), ([True, True, False, True, True, True], 3)):
        recorder, recording, plain = pair("2.3", ("cond", "uncond"))
        left = list(noticed)
        watched = replace(
            recording,
            recording=Recording(lambda recorder=recorder: recorder, wait=Noticed(left)),  # pyright: ignore[reportArgumentType]
        )
        sigmas, recorded = tuple(1 - step / 10 for step in range(10)), []

        def passes(_step: int, recorder=recorder, recorded=recorded) -> tuple[str, ...]:
            recorded.append(recorder.recorded)
            return "cond", "uncond"

        assert_runs_agree(watched, plain, passes, sigmas)
        assert recorded[first : first + 2] == [0, 2]
        assert not left


def test_a_gpu_waits_if_it_has_come_to_the_last_block_when_all_is_launched(monkeypatch):
    come = []

    class Event:
        def record(self, stream: str) -> None:
            come.append(stream)

        def query(self) -> bool:
            return self.there

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    transformer = make("2.3", STG, PASSES).transformer
    for there in (True, False):
        Event.there = there
        with Wait(transformer) as wait:
            for block in transformer.transformer_blocks:
                with suppress(Exception):  # hooks come before what a block makes of nothing
                    block()
        assert wait.noticed == there
    assert come == ["stream of cpu"] * 2
    assert not transformer.transformer_blocks[-1]._forward_pre_hooks


def test_compiled_blocks_wait_for_nothing_and_compile_nothing_while_they_are_recorded(monkeypatch):
    calls, report, x = [], CompileReport(), torch.zeros(1, 2, 3)

    def of(name: str) -> Callable:
        return lambda video, audio, *_state: (calls.append(name), (video, audio))[1]

    forward = compiled._reported(nn.Module(), of("eager"), of("fast"), report, set(), lambda _error: False)
    for recorded, wanted in ((True, "eager"), (False, "fast"), (True, "fast")):
        monkeypatch.setattr(compiled, "_is_recorded", lambda recorded=recorded: recorded)
        forward(x, x, None, None, False, False, None, None)
        assert calls[-1] == wanted
        assert (len(report.timings), report.attempts) == ((0, 0) if len(calls) == 1 else (1, 1))
    assert not report.failure


def test_short_runs_unknown_runs_and_step_caches_are_not_recorded():
    for sigmas in (SIGMAS[-LEAST_STEPS:], ()):
        recorder, recording, plain = pair("2.3")
        recording.tabulate(sigmas)
        for step, sigma in enumerate(sigmas or SIGMAS):
            recording(*tokens(plain, step), sigma, "cond")
        assert recorder.recorded == 0
    recorder, recording, plain = pair("2.3", ("cond",))
    cached = replace(recording, cache=StepCache(0.1))
    cached.tabulate(SIGMAS)
    for step, sigma in enumerate(SIGMAS):
        cached(*tokens(plain, step), sigma, "cond")
    assert recorder.recorded == 0


def test_only_weights_that_stay_on_a_cuda_device_are_recorded():
    assert Engine("embedded", "cpu")._recording is None
    engine = Engine("embedded", torch.device("cuda"))  # none of it is used
    assert engine._recording is not None
    for memory in ("offload", "stream"):
        assert Engine("embedded", torch.device("cuda"), memory=memory)._recording is None
    assert Engine("embedded", torch.device("cuda"), place=lambda *_: None)._recording is None
    assert CudaRecorder is engine._recording.recorder.func


def test_a_run_is_recorded_and_its_graphs_are_let_go(monkeypatch):
    plain, recording, recorder = Engine("embedded", "cpu"), Engine("embedded", "cpu"), Recorder()
    let_go, how = [], Recording(lambda: recorder)
    monkeypatch.setattr(Engine, "_recording", property(lambda self: how if self is recording else None))
    original = JointDenoiser.let_go
    monkeypatch.setattr(
        JointDenoiser, "let_go", lambda self: (let_go.append(self._graphs is not None), original(self))
    )
    settings, shape = SampleSettings(steps=LEAST_STEPS + 1), plain.shape("96x96", 1)
    made = [
        engine.sample(engine.encode_text("a red ball bounces"), shape, settings=settings, seed=1)
        for engine in (recording, plain)
    ]
    assert torch.equal(made[0].video, made[1].video)
    assert torch.equal(made[0].audio, made[1].audio)
    assert recorder.recorded > 0
    assert True in let_go
