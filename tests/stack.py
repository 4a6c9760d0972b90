"""A stack of layers as deep inside a module as a language model's, for tests of where weights are; needs torch alone."""

import torch


class Stack(torch.nn.Module):
    """A table of 80 bytes and six layers of 80 bytes each; ids (L,) to (L, 4)."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(5, 4)
        self.model.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return x
