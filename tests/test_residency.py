"""Memory: smaller windows when it ends, and one sentence when nothing helps."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager

import pytest
import torch
from stack import Stack
from test_audio_codec import assert_near
from test_sharing import PASSES, make, tokens
from torch import Tensor

from lockstep.model.components import ModelFiles
from lockstep.model.engine import Engine, SampleSettings
from lockstep.model.errors import MemoryShortError, WorkflowError
from lockstep.model.residency import (
    BlockStream,
    HostWeights,
    MemoryCount,
    Residence,
    StageNeed,
    Window,
    choose_pinned,
    level_embedders,
    make_plan,
    out_of_memory,
    stack_need,
    stepping_down,
    weight_bytes,
)
from lockstep.model.values import GenerateRequest, GuidePlace


def test_a_stream_goes_on_with_smaller_windows_where_memory_ended():
    frames, asked = torch.arange(10.0)[:, None], []

    def stream(window: Window) -> Iterator[Tensor]:
        asked.append(window)
        for index, piece in enumerate(frames.split(3 if window.bytes > 2**21 else 2)):
            if window.bytes > 2**21 and index == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield piece

    assert torch.equal(torch.cat(list(stepping_down(stream, Window(2**24)))), frames)
    assert asked == [Window(2**24), Window(2**21)]


def test_frames_that_do_not_fit_are_decoded_in_bands_of_rows():
    asked = []

    def stream(window: Window) -> Iterator[Tensor]:
        asked.append(window)
        if window.band_bytes is None or window.band_bytes > 2**20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield torch.zeros(1)

    assert len(list(stepping_down(stream, Window(2**22)))) == 1
    assert asked == [Window(2**22), Window(2**19), Window(1), Window(1, 2**22), Window(1, 2**19)]


def test_what_never_fits_ends_in_one_sentence():
    def stream(window: Window) -> Iterator[Tensor]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        yield

    with pytest.raises(
        MemoryShortError, match=r"decoding in bands of rows of 0\.\d MB, frames on the host does not fit"
    ):
        list(stepping_down(stream, Window(2**24)))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 9.57 GiB, other allocations: 1.2 GiB)",
        "Invalid buffer size: 12.34 GiB",
        "Could not allocate tensor with 1073741824 bytes. There is not enough GPU video memory available!",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_gpu_s_libraries_that_get_no_memory_are_told_of_as_well(said):
    assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_other_errors_pass_through():
    def stream(window: Window) -> Iterator[Tensor]:
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        list(stepping_down(stream, Window(2**24)))


def test_streamed_blocks_give_the_same_and_at_most_two_stand_beside_the_first():
    denoiser = make("2.3", (2,), PASSES)
    given = tokens(denoiser, 1)
    whole = {name: denoiser(*given, 0.7, name) for name in PASSES}
    stream, here = BlockStream.of(denoiser.transformer, torch.device("cpu")), []
    before = stream.bytes
    for block in denoiser.transformer.transformer_blocks[1:]:
        block.register_forward_hook(lambda *_: here.append(stream.bytes))
    again = tokens(denoiser, 1)  # other tensors are another step
    for name in PASSES:
        for made, wanted in zip(denoiser(*again, 0.7, name), whole[name], strict=True):
            assert_near(made, wanted, 1e-6)
    assert before < max(here) <= before + 2 * weight_bytes(denoiser.transformer.transformer_blocks[1])
    stream.let_go()


def test_no_streamed_block_runs_without_its_weights(monkeypatch):
    def let_go(self):
        for tensor in self._tensors:
            tensor.data = torch.full_like(tensor, torch.nan)  # as good as on another device

    denoiser = make("2.3", (2,), PASSES)
    whole = {name: denoiser(*tokens(denoiser, 1), 0.7, name) for name in PASSES}
    monkeypatch.setattr(HostWeights, "let_go", let_go)
    BlockStream.of(denoiser.transformer, torch.device("cpu"))
    for _ in range(2):
        again = tokens(denoiser, 1)
        for name in PASSES:
            for made, wanted in zip(denoiser(*again, 0.7, name), whole[name], strict=True):
                assert_near(made, wanted, 1e-6)


def test_what_embeds_levels_is_gone_while_blocks_run():
    denoiser = make("2.3", (2,), PASSES)
    given, whole = tokens(denoiser, 1), make("2.3", (2,), PASSES)
    stream = BlockStream.of(denoiser.transformer, torch.device("cpu"))
    before, held = stream.bytes, []
    denoiser.tabulate((0.7, 0.3))
    assert stream.bytes == before + sum(
        weight.nbytes for part in level_embedders(denoiser.transformer) for weight in part.parameters()
    )
    for block in denoiser.transformer.transformer_blocks[1:]:
        block.register_forward_hook(lambda *_: held.append(stream.bytes))
    for name in PASSES:
        for made, wanted in zip(denoiser(*given, 0.7, name), whole(*given, 0.7, name), strict=True):
            assert_near(made, wanted, 1e-6)
    block = sum(weight.nbytes for weight in denoiser.transformer.transformer_blocks[1].parameters())
    assert max(held) <= before + 2 * block
    stream.let_go()


def test_a_plan_for_streaming_leaves_out_what_embeds_levels():
    need = StageNeed("sample", 1000, 10, block=100, fixed=200, levels=150)
    assert need.streamed == 200 + 200 + 10
    assert StageNeed("sample", 1000, 10, block=100, fixed=200, levels=400).streamed == 200 + 400


def needs(*weights: int, working: int = 10) -> list[StageNeed]:
    return [StageNeed(f"stage {index}", size, working) for index, size in enumerate(weights)]


def test_the_fastest_policy_that_fits_is_chosen():
    stages = [*needs(100, 200), StageNeed("sample", 1000, 50, block=100, fixed=50)]
    assert make_plan(stages, None).policy == "resident"
    assert make_plan(stages, 2000).policy == "resident"
    assert make_plan(stages, 1200).policy == "offload"
    assert make_plan(stages, 400).policy == "stream"
    assert make_plan(stages, 2000, "offload").policy == "offload"


def test_a_plan_says_its_peak_and_where_it_is():
    stages = [*needs(2**30, 2**31), StageNeed("sample", 2**33, 2**30, block=2**28, fixed=2**28)]
    plan = make_plan(stages, 6 * 2**30)
    assert plan.peak == 2**31 + 10
    assert plan.sentence() == (
        "memory: 2.00 GB of 6.00 GB free at the peak (stage 1); blocks come one by one"
    )


def test_pictures_are_decoded_in_bands_where_no_policy_fits_without():
    stages = [*needs(100, 200), StageNeed("video", 300, 500, banded=40)]
    assert not make_plan(stages, 900).bands
    plan = make_plan(stages, 400)
    assert (plan.policy, plan.bands, plan.peak) == ("offload", True, 340)
    assert plan.sentence().endswith("; pictures are decoded in small parts, layer by layer")
    residence = Residence(torch.device("cpu"))
    residence.follow(stages, 400)
    assert residence.bands
    residence.follow(stages, 2000)
    assert not residence.bands
    with pytest.raises(MemoryShortError, match="video needs"):
        make_plan(stages, 300)


def test_what_fits_in_no_way_is_said_in_one_sentence():
    with pytest.raises(MemoryShortError, match=r"stage 0 needs .* even with --memory stream, "):
        make_plan(needs(1000), 100)
    for working, policy, advice in (
        (900, None, "make the clip smaller or shorter, or free"),
        (1, None, "use --precision float8, or free"),
        (1, "resident", "use --memory stream, or leave --memory out"),
    ):
        with pytest.raises(MemoryShortError, match=advice):
            make_plan(needs(500, working=working), 100, policy)
    with pytest.raises(WorkflowError, match="use resident, offload, stream"):
        make_plan(needs(1), None, "magic")  # type: ignore[arg-type]


def test_the_text_encoder_is_gone_before_the_transformer_comes():
    residence = Residence(torch.device("cpu"), "offload")
    modules = {name: torch.nn.Linear(4, 4) for name in ("text_encoder", "connectors", "transformer")}
    for name in ("text_encoder", "connectors"):
        residence.use(name, modules[name])
    assert residence.bytes_here == 2 * 20 * 4
    residence.use("transformer", modules["transformer"])
    assert residence.bytes_here == 20 * 4


def test_a_language_model_is_streamed_as_well():
    module, ids = Stack(), torch.arange(5)
    need, whole = stack_need("text", module), module(ids)
    assert (need.block, need.fixed) == (80, 80 + 80)
    residence, most = Residence(torch.device("cpu"), "stream"), []
    residence.use("language_model", module)
    for layer in module.model.layers:
        layer.register_forward_hook(lambda *_: most.append(residence.bytes_here))
    assert torch.equal(module(ids), whole)
    assert max(most) <= need.streamed < need.weights


def test_weights_that_came_half_way_are_let_go_again(monkeypatch):
    module, let_go = Stack(), []
    monkeypatch.setattr(HostWeights, "release", lambda weights: let_go.append(weights.bytes))

    def full(weights: HostWeights, *_):
        if weights.bytes == 80:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HostWeights, "bring", full)
    residence = Residence(torch.device("cpu"), "stream")
    with pytest.raises(torch.OutOfMemoryError):
        residence.use("language_model", module)
    assert sum(let_go) == sum(weight.nbytes for weight in module.parameters())
    assert residence.bytes_here == 0
    assert not any(layer._forward_pre_hooks for layer in module.model.layers)


def test_what_cannot_be_pinned_is_copied_as_it_is(monkeypatch):
    def full(_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    layer = torch.nn.Linear(4, 4)
    weights = HostWeights(layer, pin=True)
    weights.bring(torch.device("cpu"))
    assert weights.bytes == 80


def test_page_locked_copies_are_given_back(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    layer = torch.nn.Linear(4, 4)
    found = layer.weight.data_ptr()
    weights = HostWeights(layer, pin=True)
    weights.let_go()
    assert layer.weight.data_ptr() != found
    weights.release()
    assert layer.weight.data_ptr() == found


def test_only_as_much_is_page_locked_as_the_machine_can_spare(caplog):
    layers = list(Stack().model.layers)  # 80 bytes each
    with caplog.at_level("INFO", logger="lockstep"):
        assert choose_pinned(layers, 2 * 6 * 80) == [True] * 6
        assert not caplog.messages
        assert choose_pinned(layers, 2 * 3 * 80 + 100) == [True] * 3 + [False] * 3
    assert caplog.messages == ["memory: 3 of 6 blocks are copied without pinning, which takes longer"]


def test_resident_weights_are_brought_once(monkeypatch):
    brought = []
    monkeypatch.setattr(HostWeights, "bring", lambda self, device, copies=None: brought.append(self))
    residence, module = Residence(torch.device("cpu")), torch.nn.Linear(4, 4)
    for _ in range(3):
        residence.use("transformer", module)
    assert len(brought) == 1


def test_bytes_are_counted_while_they_live():
    with MemoryCount() as count:
        a = torch.zeros(1000)
        b = a[:10]
        del a
        held = count.alive
        del b
        torch.zeros(500)
    assert (held, count.peak, count.alive) == (4000, 4000, 0)


def test_views_of_what_was_there_before_are_not_counted():
    weight = torch.zeros(1000)
    with MemoryCount() as count:
        part = weight[:10]
        made = part + 1
    assert count.peak == made.nbytes


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("embedded", "cpu")


def test_a_plan_waits_while_another_run_moves_weights(engine):
    shape = engine.shape(seconds=1)
    with ThreadPoolExecutor(1) as pool:
        with engine._lock:
            assert engine.plan(shape).policy == "resident"  # from within a run
            other = pool.submit(engine.plan, shape)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.2)
        assert other.result(timeout=60).policy == "resident"


def test_copies_go_into_the_computation_s_memory_and_end_before_it_is_given_away(monkeypatch):
    log, module, copying = [], Stack(), []

    class Event:
        def __init__(self, number: int):
            self.number = number

    class Stream:
        made = 0

        def record_event(self) -> Event:
            self.made += 1
            return Event(self.made)

        def wait_stream(self, _other) -> None:
            log.append("copies wait")

        def wait_event(self, event: Event) -> None:
            log.append(f"computation waits for copy {event.number}")

    @contextmanager
    def entered(stream):
        copying.append(stream)
        yield
        copying.clear()

    def empty(host, device):
        assert not copying, "memory of the copies' stream is unmapped while the computation reads it"
        return host.clone()

    stream = BlockStream.of(module, torch.device("cpu"))
    stream._copies, computation, let_go = Stream(), Stream(), HostWeights.let_go
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computation)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch, "empty_like", empty)
    monkeypatch.setattr(HostWeights, "let_go", lambda weights: log.append("let go") or let_go(weights))
    module.model.layers[1](torch.zeros(4))
    assert log[:3] == ["copies wait", "computation waits for copy 1", "copies wait"]
    log.clear()
    module.model.layers[4](torch.zeros(4))  # the second copy was for another block, which does not run
    assert log[:3] == ["computation waits for copy 2", "let go", "copies wait"]


@pytest.mark.parametrize("seconds", [1, 3])
def test_a_forecast_meets_what_the_stages_really_hold(engine, seconds):
    shape, prompt = engine.shape(seconds=seconds), "a red ball bounces"
    prompts = (engine.tokenizer.encode(prompt).places, 1)
    forecast = {need.name: need.working for need in engine.plan(shape, prompts=prompts).needs}
    longest = engine.plan(shape).needs[0].working
    engine.load()

    def measured(run):
        with MemoryCount() as count:
            made = run()
        return count.peak, made

    found = {}
    found["text"], conditioning = measured(lambda: engine.encode_text(prompt))
    settings = SampleSettings(steps=2)
    found["sample"], latents = measured(lambda: engine.sample(conditioning, shape, settings=settings))
    found["video"], _ = measured(lambda: [len(piece) for piece in engine.video_frames(latents)])
    found["audio"], _ = measured(lambda: engine.decode_audio(latents))
    for stage, wanted in found.items():
        assert forecast[stage] == pytest.approx(wanted, rel=0.15), stage
    assert longest > forecast["text"]  # of prompts that nobody has told


@pytest.mark.parametrize(
    "frames", [(), (0,), (0, -1), (None,)], ids=["none", "first", "first and last", "reference"]
)
def test_a_forecast_meets_what_sampling_with_given_pictures_really_holds(engine, frames):
    shape, picture = engine.shape(seconds=3), torch.rand(96, 96, 3)
    at = [shape.frames - 1 if frame == -1 else frame for frame in frames]
    guides = [engine.encode_image(picture, shape, frame) for frame in at]
    places = tuple(map(GuidePlace.of, guides))
    plain, need = (engine.plan(shape, guides=given).needs[1].working for given in ((), places))
    engine.load()
    conditioning = engine.encode_text("a red ball bounces")
    with MemoryCount() as count:
        engine.sample(conditioning, shape, guides, SampleSettings(steps=2))
    assert need == pytest.approx(count.peak, rel=0.06)  # what guides add to a clip so short is 8 % of it
    assert (need > 1.05 * plain) == any(frame != 0 for frame in at)


def test_a_picture_in_the_clip_s_own_place_needs_no_rows_of_every_token(engine):
    shape = engine.shape(seconds=3)
    first = GuidePlace(0, 1.0, (1, shape.latent_height, shape.latent_width))
    plain, held = (engine.plan(shape, guides=given).needs[1].working for given in ((), (first,)))
    assert held < 1.02 * plain


def test_a_request_s_pictures_are_in_its_plan(monkeypatch):
    engine, asked = Engine("embedded", "cpu", memory="resident"), []
    plan, shape, picture = engine.plan, engine.shape(seconds=1), torch.rand(96, 96, 3)
    monkeypatch.setattr(engine, "plan", lambda *given: asked.append(given[-1]) or plan(*given))
    request = GenerateRequest("a red ball", last_image=picture, reference=picture, reference_attention=0.5)
    engine._say_plan(shape, request, engine.recipe.guidance)
    grid = (1, shape.latent_height, shape.latent_width)
    assert asked == [(GuidePlace(shape.frames - 1, 1.0, grid), GuidePlace(None, 0.5, grid))]


@pytest.mark.parametrize(("memory", "looked"), [("resident", True), ("stream", False)])
def test_streamed_weights_are_not_read_a_second_time_on_the_host(monkeypatch, memory, looked):
    engine, checked = Engine("embedded", "cpu", memory=memory), []
    monkeypatch.setattr(
        ModelFiles, "check_numbers", lambda _files, component, _module: checked.append(component)
    )
    engine._loaded.device = torch.device("cuda")  # weights stay where they are
    assert engine._loaded.transformer
    assert checked == (["transformer"] if looked else [])


def test_policies_make_the_same_clip(engine):
    shape = engine.shape(seconds=1)
    clips = []
    for policy in (None, "offload", "stream"):
        other = Engine("embedded", "cpu", memory=policy)
        latents = other.sample(
            other.encode_text("a red ball bounces"), shape, settings=SampleSettings(steps=2), seed=1
        )
        clips.append(other.decode_video(latents))
    assert torch.equal(clips[0], clips[1])
    assert torch.equal(clips[0], clips[2])
