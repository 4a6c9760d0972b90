"""Prompt to the hidden states of a Gemma language model, which `transformers` runs (spec sections 1.2 and 2.14).

The model sees the true tokens alone, without padding: the states are the same, and the registers that fill the rest
belong to the connectors. B batch, L tokens, D width, Z states.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PromptError, UnsupportedModelError
from ..layers.linear import Linear, replace_linears
from .tokenizer import Tokens

# model_type of the published text config -> the classes of `transformers` for config and model
_CLASSES: Mapping[str, tuple[str, str]] = {
    "gemma3_text": ("Gemma3TextConfig", "Gemma3TextModel"),
    "gemma4_text": ("Gemma4TextConfig", "Gemma4TextModel"),
    "gemma4_unified_text": ("Gemma4UnifiedTextConfig", "Gemma4UnifiedTextModel"),
}
_BOS = "<bos>"
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # tokenizers refuse it by a TypeError


class GemmaEncoder(nn.Module):
    """A Gemma text model whose every layer's output is a state.

    section: the model's own text config, with its model_type. Raises UnsupportedModelError where `transformers` is
    absent or too old, or does not take the config.
    """

    def __init__(self, section: Mapping[str, Any]):
        super().__init__()
        kind = str(section.get("model_type"))
        if kind not in _CLASSES:
            raise UnsupportedModelError(
                f"language model {kind!r} is not supported: {', '.join(_CLASSES)} are"
            )
        config_name, model_name = _CLASSES[kind]
        settings = {name: value for name, value in section.items() if name != "model_type"}
        try:
            config = _transformers(config_name)(**settings)
            self.model: nn.Module = _transformers(model_name)(config)
        except UnsupportedModelError:
            raise
        except Exception as error:  # the library and its validators raise errors of their own
            raise UnsupportedModelError(
                f"`transformers` does not take this {kind} config: {error}"
            ) from error
        replace_linears(self.model, Linear.of)  # a processor may have no products of 16-bit numbers
        self._count = settings["num_hidden_layers"] + 1
        _compute_what_no_file_holds(self.model, settings["hidden_size"])

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Ids (B, L) and mask (B, L; 1 = a token) to states (B, L, D, Z): embedding first, final norm last."""
        return torch.stack(self._states(ids_BL, mask_BL), dim=-1)

    def _states(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, ...]:
        if ids_BL.is_meta:
            # a forecast: not every release of the library runs there, and many states outweigh what a layer holds
            weight = self.model.get_submodule("embed_tokens").get_parameter("weight")
            return tuple(weight.new_empty(*ids_BL.shape, weight.shape[1]) for _ in range(self._count))
        made = self.model(
            input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True, use_cache=False
        )
        return made.hidden_states


def _compute_what_no_file_holds(model: nn.Module, width: int) -> None:
    """Rotary frequencies and the embedding's scale, on the CPU even while the model is built on meta."""
    with torch.device("cpu"):
        for name, child in list(model.named_children()):
            if name.startswith("rotary_emb"):
                setattr(model, name, type(child)(child.config))
        model.get_submodule("embed_tokens").embed_scale = torch.tensor(width**0.5)


def _transformers(name: str) -> Any:
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UnsupportedModelError(
            "the text encoder of this model needs the Python package transformers, which ComfyUI brings: "
            "pip install transformers"
        ) from error
    found = getattr(library, name, None)
    if found is None:
        raise UnsupportedModelError(
            f"the text encoder of this model needs a newer transformers with {name}, found {library.__version__}: "
            "pip install -U transformers"
        )
    return found


@dataclass(frozen=True, slots=True)
class GemmaTokenizer:
    """Prompt to ids: stripped, beginning with <bos>, no end mark, cut at `longest` (spec section 1.2).

    Raises CheckpointError for an id beyond `words`. Half a surrogate pair, which is no character, counts as U+FFFD.
    """

    encode_plain: Any  # text -> list of ids, without special tokens
    bos: int
    longest: int
    words: int = 2**31  # that the text encoder knows
    origin: str = "the tokenizer"  # where it was found

    @classmethod
    def from_json(cls, text: str, longest: int) -> "GemmaTokenizer":
        """Reads a `tokenizer.json`. Raises CheckpointError for a damaged one, UnsupportedModelError without `tokenizers`."""
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            raise UnsupportedModelError(
                "the tokenizer of this model needs the Python package tokenizers, which comes with transformers: "
                "pip install transformers"
            ) from error
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"the tokenizer's JSON is damaged: {str(error)[:200]}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        bos = tokenizer.token_to_id(_BOS)
        if bos is None:  # under another name it shows in front of nothing
            bos = next(iter(tokenizer.encode("", add_special_tokens=True).ids), None)
        if bos is None:
            raise CheckpointError(f"the tokenizer knows no {_BOS}: it does not belong to a Gemma model")
        return cls(lambda prompt: tokenizer.encode(prompt, add_special_tokens=False).ids, bos, longest)

    @classmethod
    def from_sentencepiece(cls, model: bytes, longest: int) -> "GemmaTokenizer":
        """Reads a `tokenizer.model`. Raises as from_json does, for the package sentencepiece."""
        try:
            library = importlib.import_module("sentencepiece")
        except ImportError as error:
            raise UnsupportedModelError(
                "this text encoder brings its tokenizer as a sentencepiece model, which needs the Python package "
                "sentencepiece: pip install sentencepiece, or put the model's tokenizer.json beside it"
            ) from error
        try:
            tokenizer = library.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises RuntimeError and its own
            raise CheckpointError(f"the sentencepiece model is damaged: {str(error)[:200]}") from error
        return cls(tokenizer.encode, tokenizer.bos_id(), longest)

    def encode(self, prompt: str, required: bool = True) -> Tokens:
        """Ids of a prompt; an empty one is <bos> alone. Raises PromptError for an empty one that is required."""
        stripped = _HALF_PAIR.sub("\ufffd", prompt.strip())
        if required and not stripped:
            raise PromptError("the prompt is empty: say what is to be seen and heard")
        ids = [self.bos, *self.encode_plain(stripped)]
        kept = ids[: self.longest]
        if max(kept) >= self.words:  # no word of the encoder; a GPU would never recover from reading there
            raise CheckpointError(
                f"{self.origin} makes token {max(kept)} of this prompt, and the text encoder has {self.words}: it belongs to another "
                "model: put the tokenizer.json of this one in its place"
            )
        return Tokens(torch.tensor(kept, dtype=torch.int64), (), len(ids) - len(kept))
