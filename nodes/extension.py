"""The list of nodes that ComfyUI asks for."""

from comfy_api.latest import ComfyExtension, io

from .audio_decode import LockstepAudioDecode
from .image_encode import LockstepImageEncode
from .loader import LockstepLoader
from .sampler import LockstepSampler
from .text_encode import LockstepTextEncode
from .vae_decode import LockstepVAEDecode


class LockstepExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LockstepLoader,
            LockstepTextEncode,
            LockstepImageEncode,
            LockstepSampler,
            LockstepVAEDecode,
            LockstepAudioDecode,
        ]
