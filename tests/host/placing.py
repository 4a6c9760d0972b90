"""Run by ComfyUI's own Python: its memory manager loads, frees and reloads a stack of layers, whole and streamed.

python placing.py COMFYUI PACK: two folders. Prints one line of JSON: after every step what the manager holds (kind of
patcher, bytes), whether the stack computes the same, and at the end how many hooks are left.
"""

import importlib
import json
import sys
from pathlib import Path

COMFYUI, PACK = map(Path, sys.argv[1:3])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [str(COMFYUI), str(PACK.parent)]
importlib.import_module("comfy.options").enable_args_parsing()
importlib.import_module("utils.install_util")  # before anybody's own `utils`
torch = importlib.import_module("torch")
memory = importlib.import_module("comfy.model_management")
host = importlib.import_module(f"{PACK.name}.nodes.host")


class Stack(torch.nn.Module):
    """560 bytes, 320 of them streamed: a table and six layers."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(5, 4)
        self.model.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))

    def forward(self, ids):
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return x


def held() -> list:
    models = [entry.model for entry in memory.current_loaded_models]
    return [model and [type(model).__name__, model.loaded_size()] for model in models]


stack, ids, steps = Stack(), torch.arange(5), []
wanted, placement = stack(ids), host._Placement(torch.device("cpu"), "auto")
for does_not_fit in (False, True, True, False):
    placement._is_too_large = lambda _size, answer=does_not_fit: answer
    placement(stack, 0)
    steps.append([held(), torch.equal(stack(ids), wanted)])
placement._is_too_large = lambda _size: True
placement(stack, 0)
for act in (memory.unload_all_models, lambda: placement(stack, 0), memory.cleanup_models_gc):
    act()
    steps.append([held(), torch.equal(stack(ids), wanted)])
memory.unload_all_models()
hooks = sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in stack.model.layers)
sys.stdout.write(json.dumps([steps, hooks]) + "\n")
