"""ComfyUI-Lockstep: joint audio-video generation. ComfyUI's entry; importable without it, `model` is plain PyTorch."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls for the pack's nodes."""
    from .nodes.extension import LockstepExtension

    return LockstepExtension()
