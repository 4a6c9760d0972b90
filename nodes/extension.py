"""The list of nodes that ComfyUI asks for."""

from comfy_api.latest import ComfyExtension, io

from .audio_decode import LockstepAudioDecode
from .audio_encode import LockstepAudioEncode
from .clip_report import LockstepClipReport
from .empty_av_latent import LockstepEmptyAVLatent
from .extend import LockstepExtend
from .image_encode import LockstepImageEncode
from .latent_upscale import LockstepLatentUpscale
from .load_av_latent import LockstepLoadAVLatent
from .loader import LockstepLoader
from .lora import LockstepLoRA
from .sampler import LockstepSampler
from .save_av_latent import LockstepSaveAVLatent
from .save_clip import LockstepSaveClip
from .text_encode import LockstepTextEncode
from .vae_decode import LockstepVAEDecode
from .video_encode import LockstepVideoEncode


class LockstepExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LockstepLoader,
            LockstepTextEncode,
            LockstepImageEncode,
            LockstepSampler,
            LockstepVAEDecode,
            LockstepAudioDecode,
            LockstepVideoEncode,
            LockstepAudioEncode,
            LockstepEmptyAVLatent,
            LockstepExtend,
            LockstepLoadAVLatent,
            LockstepSaveAVLatent,
            LockstepClipReport,
            LockstepSaveClip,
            LockstepLoRA,
            LockstepLatentUpscale,
        ]
