"""The workflows that the pack ships, written down once: `python tests/host/make_workflows.py` writes all of them.

For each the page's own format into workflows/, and what the page sends for it into tests/host/api/. That the page really
sends this is proven by test_in_a_browser.py; their thumbnails come from test_on_comfyui.py, run once with
LOCKSTEP_FREEZE=1.
"""

import json
import uuid
from pathlib import Path
from typing import Any

from lockstep.model.checkpoint import keymap
from lockstep.model.checkpoint.published_files import PUBLISHED as FILES

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = json.loads((ROOT / "tests/host/object_info.json").read_text(encoding="utf-8"))
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
# one value more behind these, for a button that the page adds
BUTTONS = {"LoadImage": ["image"], "LoadVideo": ["image"], "LoadAudio": ["", ""]}
COLUMN, GAP, TOP = 40, 50, 120
WIDTHS = {
    "LockstepTextEncode": 400,
    "SaveVideo": 400,
    "LockstepSaveClip": 400,
    "LoadImage": 320,
    "MarkdownNote": 400,
}
HEIGHTS = {"LockstepTextEncode": 220, "SaveVideo": 440, "SaveAnimatedWEBP": 400, "LoadImage": 330, "LoadVideo": 330,
           "LoadAudio": 140, "MarkdownNote": 360, "SaveAudio": 140, "LockstepVAEDecode": 130, "LockstepAudioDecode": 110, "LockstepClipReport": 300, "LockstepSaveClip": 460, "SaveImage": 300}  # fmt: skip

CHECKPOINT, UPSCALER, GEMMA = (
    FILES["2.3"][component].name
    for component in (keymap.TRANSFORMER, keymap.UPSAMPLER, keymap.LANGUAGE_MODEL)
)
LORA = "ltx-2.3-22b-distilled-lora-384.safetensors"
WITHIN = {"text_encoders": "split_files/text_encoders/"}  # of its repository
# folder of the host's models, and where the file is published: what the page offers to download if it is missing
PUBLISHED = {
    file.name: (file.folder, f"{file.repository}/resolve/main/{WITHIN.get(file.folder, '')}{file.name}")
    for file in FILES["2.3"].values()
} | {LORA: ("loras", f"Lightricks/LTX-2.3/resolve/main/{LORA}")}
RED_BALL = "a red ball bounces on a gray background"
Link = tuple[str, int]
Node = tuple[str, dict[str, Any]]  # type, inputs that differ from the default; a link is (id, slot)


def loader(model: str = "embedded", **more: Any) -> Node:
    return "LockstepLoader", {"model": model, **more}


def text(prompt: str = RED_BALL, negative: str = "") -> Node:
    return "LockstepTextEncode", {"model": ("loader", 0), "prompt": prompt, "negative": negative}


def image_encode(conditioning: str, image: str, frame: int, strength: float = 1.0, **more: Any) -> Node:
    inputs = {"conditioning": (conditioning, 0), "image": (image, 0), "frame": frame, "strength": strength}
    return "LockstepImageEncode", inputs | more


def sampler(conditioning: str = "text", **more: Any) -> Node:
    inputs = {"model": ("loader", 0), "conditioning": (conditioning, 0), "seed": 7}
    return "LockstepSampler", inputs | more


def clip_out(video: Link = ("sampler", 0), audio: Link = ("sampler", 1)) -> list[dict[str, Node]]:
    """From latents to a file."""
    return [
        {
            "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": video}),
            "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": audio}),
            "clip": (
                "CreateVideo",
                {"images": ("pictures", 0), "fps": ("pictures", 1), "audio": ("sound", 0)},
            ),
        },
        {"save": save()},
    ]


def save() -> Node:
    return "SaveVideo", {"video": ("clip", 0), "filename_prefix": "video/lockstep"}


def picture() -> Node:
    return "LoadImage", {"image": "example.png"}


# name -> what its note says, and its nodes column by column
WORKFLOWS: dict[str, tuple[str, list[dict[str, Node]]]] = {
    "text_to_clip": (
        """**A clip with its sound, from words.** Press Run.

- **Prompt**: say shape, colour, motion and background, such as *a blue star pulses on a navy background in the rain*.
- **Seed**: another number, another clip. It changes after each run.
- **Aspect, seconds, fps, steps, cfg**: 0 and *model default* take what the model likes best.
- **Model**: *embedded* needs no download. Files of `models/checkpoints` are in the same list.

The pictures' rate goes from Lockstep VAE Decode to Create Video, so that picture and sound end together.""",
        [{"loader": loader()}, {"text": text()}, {"sampler": sampler()}, *clip_out()],
    ),
    "image_to_clip": (
        """**A clip that begins with your picture.** Choose it in Load Image and press Run.

- **Frame**: 0 begins with the picture, -1 ends with it.
- **Strength**: 1 keeps the picture as it is, less lets the model change it.
- **Prompt**: what is to happen. The picture is cut to the clip's aspect around its centre.
- **Seed**: another number, another clip. It changes after each run.""",
        [
            {"loader": loader(), "image": picture()},
            {"text": text(), "first": image_encode("text", "image", 0)},
            {"sampler": sampler("first")},
            *clip_out(),
        ],
    ),
    "first_and_last_frame": (
        """**A clip between two pictures.** Choose both and press Run.

- **Frame** 0 is the first, -1 the last, whatever the clip's length.
- **Strength** below 1 lets the model bend a picture to the motion.
- Two Lockstep Image Encode in a row: each adds its picture to what comes in.""",
        [
            {"loader": loader(), "image": picture(), "other": picture()},
            {
                "text": text(),
                "first": image_encode("text", "image", 0),
                "last": image_encode("first", "other", -1),
            },
            {"sampler": sampler("last")},
            *clip_out(),
        ],
    ),
    "keyframes": (
        """**Pictures at any frame.** Each Lockstep Image Encode puts its picture at its **frame**.

- Add as many as you like, one after the other; the order does not matter, but each needs a frame of its own.
- Frames count from 0, or from the end: -1 is the last, -5 the fifth from the end. At 12 frames per second, frame 12 is at one second.
- **Strength** below 1 makes a keyframe a hint.""",
        [
            {"loader": loader(), "image": picture(), "other": picture()},
            {
                "text": text(),
                "early": image_encode("text", "image", 4, 0.9),
                "late": image_encode("early", "other", -5, 0.9),
            },
            {"sampler": sampler("late")},
            *clip_out(),
        ],
    ),
    "ltx_one_stage": (
        """**A published LTX-2.x checkpoint** in place of the embedded model, in one stage.

- Put the file into `models/checkpoints` (or `models/diffusion_models`), press R and choose it in Lockstep Loader; the page offers the addresses of files that are missing. Its text encoder, a Gemma folder or file, belongs in `models/text_encoders`; parts that come in files of their own are found in `models/vae`.
- **Aspect** offers the usual sizes of these models. **Steps, cfg, stg** at their defaults take the recipe of the checkpoint.
- In Lockstep Loader **offload** *auto* brings blocks one by one where the whole does not fit on the GPU, *stream* always does, **attention** takes another kernel, **compile** spends a minute or more first and says what it saved.
- Read the terms of these weights before you use them. No published weight was run for this workflow.""",
        [
            {"loader": loader(CHECKPOINT)},
            {"text": text("a red ball bounces on a wooden table, a dull thud at every bounce")},
            {"sampler": sampler(aspect="768x512")},
            *clip_out(),
        ],
    ),
    "ltx_two_stage": (
        """**A published LTX-2.x checkpoint in two stages**: small first, then twice as large with new detail.

- Put the checkpoint into `models/checkpoints`, its spatial upscaler into `models/latent_upscale_models` and its distilled LoRA into `models/loras`; press R and choose them. The text encoder belongs in `models/text_encoders`.
- The second sampler goes on from the upscaled latent: **refine** *spatial* takes the few steps published for it, which are made for distilled weights. With a distilled checkpoint leave Lockstep LoRA out.
- The sound comes from the first stage. With a distilled checkpoint take it from the second: it gains by those steps.
- Read the terms of these weights before you use them. No published weight was run for this workflow.""",
        [
            {"loader": loader(CHECKPOINT)},
            {
                "text": text("a red ball bounces on a wooden table, a dull thud at every bounce"),
                "lora": ("LockstepLoRA", {"model": ("loader", 0), "lora": LORA}),
            },
            {"sampler": sampler()},
            {
                "upscale": (
                    "LockstepLatentUpscale",
                    {"model": ("loader", 0), "latent": ("sampler", 2), "upscaler": UPSCALER},
                ),
                "second": (
                    "LockstepSampler",
                    {
                        "model": ("lora", 0),
                        "conditioning": ("text", 0),
                        "latent": ("upscale", 0),
                        "refine": "spatial",
                        "seed": 8,
                    },
                ),
            },
            *clip_out(("second", 0), ("sampler", 1)),
        ],
    ),
    "ltx_lora": (
        """**A LoRA on a published LTX-2.x checkpoint.** Put it into `models/loras`, press R and choose it in Lockstep LoRA.

- **Strength**: 1 as it was trained, 0 off, below 0 the opposite way. Several LoRAs: one node after the other.
- Text Encode and Sampler both get the model with the LoRA; the decoders need not.
- A file with *distilled* in its name brings the distilled model's few steps, without guidance, from a strength of 0.75 on.
- Read the terms of these weights before you use them. No published weight was run for this workflow.""",
        [
            {
                "loader": loader(CHECKPOINT),
                "lora": ("LockstepLoRA", {"model": ("loader", 0), "lora": LORA}),
            },
            {
                "text": (
                    "LockstepTextEncode",
                    {
                        "model": ("lora", 0),
                        "prompt": "a red ball bounces on a wooden table, a dull thud at every bounce",
                        "negative": "",
                    },
                )
            },
            {"sampler": sampler(model=("lora", 0))},
            *clip_out(),
        ],
    ),
    "reference": (
        """**A picture of the object beside the clip.** Choose it in Load Image and press Run.

- **Use as** *reference*: the picture shows what the object looks like; the clip need not begin with it. *frame* would make the clip show the picture itself.
- **Strength** below 1 makes it a hint. One reference a clip; pictures at frames can be added with further Lockstep Image Encode.
- **Attention** below 1 lets clip and picture see less of each other.""",
        [
            {"loader": loader(), "image": picture()},
            {"text": text(), "look": image_encode("text", "image", 0, use_as="reference")},
            {"sampler": sampler("look")},
            *clip_out(),
        ],
    ),
    "quick_draft": (
        """**A clip sooner, and nearly the same.** Press Run.

- **Step cache**: steps leave out most of the model where the picture, or the sound, changes by less than this share. 0.1 is careful, 0 is off and exact.
- The first run of a prompt tries a clip of a second with and without it. Where its sound changes, the cache turns itself off, wholly or for the sound, and the node says so.
- Once you like a **seed**, set *step cache* to 0 and run it again.""",
        [
            {"loader": loader()},
            {"text": text("a green triangle pulses on a black background")},
            {"sampler": sampler(step_cache=0.1)},
            *clip_out(),
        ],
    ),
    "by_hand": (
        """**Every setting by hand**, where the other workflows leave it to the model. Press Run.

- Lockstep Loader: **precision** *bfloat16* computes with half the bits, **offload** *always* keeps only the part in use on the GPU, **attention** *pytorch* takes torch's own kernel, **compile** prepares the transformer at the first run of a size, which takes a minute or more; where it cannot, the sampler says why and goes on without.
- Lockstep Sampler: **aspect** *custom* takes **width** and **height**; **fps**, **steps**, **cfg** of picture and sound, **sampler** and **stg block** are told in its help.
- 0, *auto* and *model default* give each of them back to the model.""",
        [
            {
                "loader": loader(precision="bfloat16", offload="always", attention="pytorch", compile=True),
            },
            {"text": text("a purple star orbits on a navy background", "rain and wind")},
            {
                "sampler": sampler(
                    aspect="custom",
                    width=128,
                    height=96,
                    seconds=1.5,
                    fps=16.0,
                    steps=24,
                    cfg_video=2.5,
                    cfg_audio=3.0,
                    sampler="ancestral",
                    stg=0.2,
                    stg_block=2,
                )
            },
            *clip_out(),
        ],
    ),
    "portrait": (
        """**An upright clip.** *Aspect* 9:16 keeps the model's own short side and makes the clip tall.

- *custom* takes **width** and **height** instead. A size that the model cannot take is refused with the nearest that it can.
- **Seconds** is rounded to the nearest count of frames that the model holds.""",
        [
            {"loader": loader()},
            {"text": text("a blue star swings on a navy background")},
            {"sampler": sampler(aspect="9:16", seconds=2.0)},
            *clip_out(),
        ],
    ),
    "landscape": (
        """**A wide clip**, with smoother motion and a steadier object.

- *Aspect* 16:9 keeps the model's own short side and makes the clip wide.
- **Fps** 16 makes more frames of the same time.
- **Stg** above 0 asks the model once more a step, with one block perturbed, and moves away from what that gives. Here the block is the model's own choice.""",
        [
            {"loader": loader()},
            {"text": text("a green square slides on a black background", "rain and wind")},
            {"sampler": sampler(aspect="16:9", fps=16.0, stg=1.0)},
            *clip_out(),
        ],
    ),
    "image_nodes_before_and_after": (
        """**Between ComfyUI's own image nodes.**

- Before: Load Image → Upscale Image (here it makes it smaller) → Lockstep Image Encode. The **MASK** of a picture with transparent parts lets the model fill them; one of a picture without does nothing.
- **Height** 0 and **crop** *disabled* keep the picture's aspect, so that the mask stays in its place. One that you crop needs a mask that is cropped likewise: Convert Mask to Image → Upscale Image → Convert Image to Mask.
- After: the frames are an ordinary batch of images. Here they are enlarged four times and saved as an animated WEBP, with the sound beside it.""",
        [
            {
                "loader": loader(),
                "image": picture(),
            },
            {
                "text": text("a yellow triangle pulses on a brown background"),
                "smaller": (
                    "ImageScale",
                    {
                        "image": ("image", 0),
                        "upscale_method": "area",
                        "width": 256,
                        "height": 0,  # as the aspect has it
                        "crop": "disabled",
                    },
                ),
                "first": image_encode("text", "smaller", 0, 0.9, mask=("image", 1)),
            },
            {"sampler": sampler("first")},
            {
                "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": ("sampler", 0)}),
                "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": ("sampler", 1)}),
                "larger": (
                    "ImageScaleBy",
                    {"image": ("pictures", 0), "upscale_method": "lanczos", "scale_by": 4.0},
                ),
            },
            {
                "save": (
                    "SaveAnimatedWEBP",
                    {"images": ("larger", 0), "filename_prefix": "lockstep", "fps": ("pictures", 1)},
                ),
                "save_sound": (
                    "SaveAudio",
                    {"audio": ("sound", 0), "filename_prefix": "audio/lockstep"},
                ),
            },
        ],
    ),
    "extend": (
        """**A clip that goes on.** The first sampler makes a clip, the second what comes after it, in picture and sound.

- **Seconds** of Lockstep Extend: how much comes after. The embedded model makes clips of up to 4.2 s in all.
- A clip of yours goes on likewise: Lockstep Video Encode into **latent**, Lockstep Audio Encode into **audio_latent**. Of a long one encode the end alone, and join the files afterwards.
- Another prompt for what comes after: a second Lockstep Text Encode for the second sampler.""",
        [
            {"loader": loader()},
            {"text": text()},
            {"sampler": sampler()},
            {
                "extend": (
                    "LockstepExtend",
                    {"model": ("loader", 0), "latent": ("sampler", 2), "seconds": 1.5},
                ),
                "second": sampler(latent=("extend", 0)),
            },
            *clip_out(("second", 0), ("second", 1)),
        ],
    ),
    "clip_to_sound": (
        """**Choose a video of your own in Load Video first**, of 25 frames or more: this workflow makes a sound to it.

- Count and size of its frames must be ones that the model holds: ImageScale and ImageFromBatch see to that. For the embedded model 96x96 and 4k+1 frames, here 25, at 12 to 24 per second.
- The pictures go into the new file as they are; the sampler makes the sound alone. **Prompt**: what is seen and heard.""",
        [
            {
                "file": ("LoadVideo", {"file": "clip.mp4"}),
                "parts": ("GetVideoComponents", {"video": ("file", 0)}),
                "loader": loader(),
            },
            {
                "some": ("ImageFromBatch", {"image": ("parts", 0), "batch_index": 0, "length": 25}),
                "small": (
                    "ImageScale",
                    {
                        "image": ("some", 0),
                        "upscale_method": "area",
                        "width": 96,
                        "height": 96,
                        "crop": "center",
                    },
                ),
                "text": text(),
            },
            {
                "encoded": (
                    "LockstepVideoEncode",
                    {"model": ("loader", 0), "images": ("small", 0), "fps": ("parts", 2)},
                ),
                "sampler": sampler(latent=("encoded", 0)),
            },
            {
                "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": ("sampler", 1)}),
                "clip": (
                    "CreateVideo",
                    {"images": ("some", 0), "fps": ("parts", 2), "audio": ("sound", 0)},
                ),
                "save": save(),
            },
        ],
    ),
    "sound_to_clip": (
        """**Choose a sound of your own in Load Audio first**: this workflow makes pictures to its first two seconds.

- **Seconds** of Lockstep Audio Encode: 0 is as long as the sound; the embedded model makes 1 to 4.2 seconds.
- The sampler takes length and fps from the sound, and the size from its own inputs.
- Create Video gets the sound as it was; for what the model heard of it, connect Lockstep Audio Decode in its place.""",
        [
            {"loader": loader(), "file": ("LoadAudio", {"audio": "sound.wav"})},
            {
                "text": text(),
                "encoded": (
                    "LockstepAudioEncode",
                    {"model": ("loader", 0), "audio": ("file", 0), "seconds": 2.0},
                ),
            },
            {"sampler": sampler(latent=("encoded", 0))},
            {
                "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": ("sampler", 0)}),
                "clip": (
                    "CreateVideo",
                    {"images": ("pictures", 0), "fps": ("pictures", 1), "audio": ("file", 0)},
                ),
                "save": save(),
            },
        ],
    ),
    "latents_to_file": (
        """**Latents instead of a clip**: sample now, decode later or on another machine.

- **Aspect, seconds, fps** of Lockstep Empty AV Latent say how large and long the clip is; several samplers with the same one agree.
- **Filename prefix** of Lockstep Save AV Latent: folder and beginning of the file's name.
- The file holds picture, sound and this workflow. *file_to_clip* decodes it.""",
        [
            {"loader": loader()},
            {
                "text": text("a purple ball orbits on a gray background"),
                "empty": ("LockstepEmptyAVLatent", {"model": ("loader", 0), "aspect": "4:3"}),
            },
            {"sampler": sampler(latent=("empty", 0))},
            {
                "save": (
                    "LockstepSaveAVLatent",
                    {"latent": ("sampler", 2), "filename_prefix": "latents/lockstep"},
                )
            },
        ],
    ),
    "clip_report": (
        """**What a clip is like**, measured. Press Run, or connect frames and sound of any other clip.

- The picture on Lockstep Clip Report: motion above, sound below; yellow is what is seen to happen, red is what is heard to start.
- Its **report** and **json** say whether sound fits picture (positive: the sound is late), how loud it is, and what a viewer would notice.
- **Prompt** and **seed**: another clip to measure. Where no clear event is there to judge, no offset is told.""",
        [
            {"loader": loader()},
            {"text": text()},
            {"sampler": sampler()},
            {
                "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": ("sampler", 0)}),
                "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": ("sampler", 1)}),
            },
            {
                "report": (
                    "LockstepClipReport",
                    {
                        "images": ("pictures", 0),
                        "fps": ("pictures", 1),
                        "audio": ("sound", 0),
                        "latent": ("sampler", 2),
                    },
                ),
                "clip": (
                    "CreateVideo",
                    {"images": ("pictures", 0), "fps": ("pictures", 1), "audio": ("sound", 0)},
                ),
            },
            {"save": save()},
        ],
    ),
    "save_clip": (
        """**A clip that says how it came about.** Press Run.

- **Lockstep Save Clip** in place of Create Video and Save Video: one mp4, picture and sound equally long, with this workflow in it.
- **Disclosure** tells sites that read it that a model made the clip; *compositeWithTrainedAlgorithmicMedia* where your own pictures or sound are part of it.
- **Content credentials** sign that with your certificate, see the node's help.""",
        [
            {"loader": loader()},
            {"text": text("a cyan triangle swings on a black background")},
            {"sampler": sampler()},
            {
                "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": ("sampler", 0)}),
                "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": ("sampler", 1)}),
            },
            {
                "save": (
                    "LockstepSaveClip",
                    {"images": ("pictures", 0), "fps": ("pictures", 1), "audio": ("sound", 0)},
                )
            },
        ],
    ),
    "trajectory": (
        """**From noise to picture.** Press Run: Save Image shows what the clip looked like at the steps named by **trajectory**.

- **Trajectory**: such as *1, 5, 20* or *all*; -1 is the last step. Empty is off.
- **Trajectory moment**: which frame of the clip is shown, 0 the first, 1 the last.
- The clip is the same with and without it.""",
        [
            {"loader": loader()},
            {"text": text("an orange star slides on a navy background")},
            {"sampler": sampler(trajectory="all")},
            {
                "way": ("SaveImage", {"images": ("sampler", 3), "filename_prefix": "lockstep/trajectory"}),
                "pictures": ("LockstepVAEDecode", {"model": ("loader", 0), "video": ("sampler", 0)}),
                "sound": ("LockstepAudioDecode", {"model": ("loader", 0), "audio": ("sampler", 1)}),
            },
            {
                "save": (
                    "LockstepSaveClip",
                    {"images": ("pictures", 0), "fps": ("pictures", 1), "audio": ("sound", 0)},
                )
            },
        ],
    ),
    "file_to_clip": (
        """**Run *latents_to_file* first, press R and choose its file in Lockstep Load AV Latent**: this workflow decodes it, without sampling again.

Only the model that made them can decode them.""",
        [
            {
                "loader": loader(),
                "file": ("LockstepLoadAVLatent", {"file": "latents/lockstep_00001_.latent [output]"}),
            },
            *clip_out(("file", 0), ("file", 0)),
        ],
    ),
}


def write_all() -> None:
    for name, (note, columns) in WORKFLOWS.items():
        numbered = {key: str(number + 1) for number, key in enumerate(_flat(columns))}
        api = {numbered[key]: _api_node(node, numbered) for key, node in _flat(columns).items()}
        _write(ROOT / "tests/host/api" / f"{name}.json", api)
        _write(ROOT / "workflows" / f"{name}.json", _page(name, note, columns, numbered))


def _flat(columns: list[dict[str, Node]]) -> dict[str, Node]:
    return {key: node for column in columns for key, node in column.items()}


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _inputs_of(kind: str) -> dict[str, list]:
    sections = SCHEMA[kind]["input"]
    return {**sections.get("required", {}), **sections.get("optional", {})}


def _is_widget(spec: list) -> bool:
    return spec[0] in WIDGETS or isinstance(spec[0], list)


def _default(spec: list) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    return spec[0][0] if isinstance(spec[0], list) else options["options"][0]


def _api_node(node: Node, numbered: dict[str, str]) -> dict:
    kind, given = node
    inputs = {}
    for name, spec in _inputs_of(kind).items():
        value = given.get(name, _default(spec) if _is_widget(spec) else None)
        if value is not None:
            inputs[name] = [numbered[value[0]], value[1]] if isinstance(value, tuple) else value
    unknown = set(given) - set(_inputs_of(kind))
    assert not unknown, f"{kind} has no {unknown}"
    return {"class_type": kind, "inputs": inputs}


def _page(name: str, note: str, columns: list[dict[str, Node]], numbered: dict[str, str]) -> dict:
    links: list[list] = []
    nodes, x = [], COLUMN
    for place, column in enumerate(columns):
        y, wide = TOP, max(WIDTHS.get(node[0], 300) for node in column.values())
        for key, node in column.items():
            height = HEIGHTS.get(node[0]) or _height(node[0])
            nodes.append(_page_node(node, int(numbered[key]), [x, y], [wide, height], numbered, links))
            y += height + GAP
        if place == 0:
            nodes.insert(
                0, _note(note, len(numbered) + 1, [x, y], [WIDTHS["MarkdownNote"], HEIGHTS["MarkdownNote"]])
            )
            wide = max(wide, WIDTHS["MarkdownNote"])
        x += wide + GAP
    for node in nodes:
        for slot, output in enumerate(node["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [node["id"], slot]]
    for order, node in enumerate(nodes):
        node["order"] = order
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"lockstep/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        # found by the loader itself: no widget names it
        **({"models": _published([GEMMA])} if CHECKPOINT in str(columns) else {}),
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _height(kind: str) -> int:
    widgets = sum(_is_widget(spec) for spec in _inputs_of(kind).values())
    sockets = max(len(_inputs_of(kind)) - widgets, len(SCHEMA[kind]["output"]))
    seed = any(len(spec) > 1 and spec[1].get("control_after_generate") for spec in _inputs_of(kind).values())
    return 40 + 22 * sockets + 26 * (widgets + seed)


def _note(text: str, number: int, pos: list[int], size: list[int]) -> dict:
    return {"id": number, "type": "MarkdownNote", "pos": pos, "size": size, "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}  # fmt: skip


def _published(values: list) -> list[dict[str, str]]:
    """What the page needs to know of the published files among these values."""
    files = [(value, *PUBLISHED[value]) for value in values if isinstance(value, str) and value in PUBLISHED]
    return [
        {"name": name, "url": f"https://huggingface.co/{place}", "directory": folder}
        for name, folder, place in files
    ]


def _page_node(
    node: Node, number: int, pos: list[int], size: list[int], numbered: dict[str, str], links: list[list]
) -> dict:
    kind, given = node
    inputs, values = [], []
    for name, spec in _inputs_of(kind).items():
        slot: dict[str, Any] = {"name": name, "type": "COMBO" if isinstance(spec[0], list) else spec[0]}
        value = given.get(name, _default(spec) if _is_widget(spec) else None)
        if _is_widget(spec):
            slot["widget"] = {"name": name}
            values.append(_default(spec) if isinstance(value, tuple) else value)
            if len(spec) > 1 and spec[1].get("control_after_generate"):
                values.append("randomize")
        slot["link"] = None
        if isinstance(value, tuple):
            source = int(numbered[value[0]])
            slot["link"] = len(links) + 1
            links.append([slot["link"], source, value[1], number, len(inputs), slot["type"]])
        inputs.append(slot)
    schema = SCHEMA[kind]
    outputs = [
        {"name": shown, "type": type_, "links": []}
        for shown, type_ in zip(schema["output_name"], schema["output"], strict=True)
    ]
    ours = kind.startswith("Lockstep")
    properties: dict[str, Any] = {"cnr_id": "lockstep", "ver": "0.1.0"} if ours else {"cnr_id": "comfy-core"}
    if chosen := _published(values):
        properties["models"] = chosen
    return {
        "id": number,
        "type": kind,
        "pos": pos,
        "size": size,
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {**properties, "Node name for S&R": kind},
        "widgets_values": values + BUTTONS.get(kind, []),
    }


if __name__ == "__main__":
    write_all()
