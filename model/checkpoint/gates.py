"""Static gates folded into the linear before them: g * (W x + b) = (g * W) x + g * b.

A distilled diffusion decoder carries them as vectors of their own (spec section 2.16); the modules know none.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor


def gated_linears(names: Iterable[str], gates: Mapping[str, str]) -> dict[str, str]:
    """Which of the names are gates, and the weight that each scales.

    gates: last part of a gate's name -> the linear beside it, such as "gate_msa" -> "attn.proj".
    """
    parted = ((name, *name.rpartition(".")[::2]) for name in names)
    return {name: f"{block}.{gates[last]}.weight" for name, block, last in parted if last in gates}


def fold_gates(state: dict[str, Tensor], gates: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with every gate multiplied into its linear's weight and bias, in float32, dtypes kept."""
    linears = gated_linears(state, gates)
    folded = {name: tensor for name, tensor in state.items() if name not in linears}
    for gate, weight in linears.items():
        factor = state[gate].float()
        for name in (weight, weight.removesuffix("weight") + "bias"):
            if name in folded:
                tensor = folded[name]
                aligned = factor.view(-1, *[1] * (tensor.ndim - 1))
                folded[name] = (tensor.float() * aligned).to(tensor.dtype)
    return folded
