"""Run by ComfyUI's own Python: its memory manager loads, frees and reloads a stack of layers, whole and streamed.

python placing.py COMFYUI PACK: two folders. Prints one line of JSON: after every step what the manager holds (kind of
patcher, bytes), whether the stack computes the same, and at the end how many hooks are left.
"""

import importlib.util
import json
import sys
from pathlib import Path

COMFYUI, PACK = map(Path, sys.argv[1:3])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, str(COMFYUI))
sys.path.append(str(PACK / "tests"))  # last: what is named as ComfyUI's own files is not meant
importlib.import_module("comfy.options").enable_args_parsing()
importlib.import_module("utils.install_util")  # before anybody's own `utils`
torch = importlib.import_module("torch")
memory = importlib.import_module("comfy.model_management")
# as ComfyUI loads it: its folder may be called like a module of others
spec = importlib.util.spec_from_file_location("the_pack", PACK / "__init__.py")
sys.modules["the_pack"] = importlib.util.module_from_spec(spec)
host = importlib.import_module("the_pack.nodes.host")
Stack = importlib.import_module("stack").Stack


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
