"""A module around mixers of transformers, and what a cut mixer should compute."""

import torch
from torch import nn


class Stock(nn.Module):
    """A mixer of transformers where no language model is: it reads the frames of a sound."""

    def __init__(self, lm):
        super().__init__()
        self.listen, self.tower = nn.Linear(2, 24), nn.Sequential(*(block.mixer for block in lm.backbone.layers))

    def forward(self, frames):
        return self.tower(self.listen(frames)).mean(1)


def stock(lm):
    torch.manual_seed(0)
    return Stock(lm).eval()


def mixers_of(model):
    return [module for module in model.modules() if hasattr(module, "A_log")]


@torch.no_grad()
def outputs(model, batches):
    return torch.cat([model(batch) for batch in batches])


def silence(mixer, kept):
    """What the cut mixer should compute, in the dense shape: B and C of all other states are zero."""
    mamba2, d_inner = mixer.A_log.dim() == 1, mixer.out_proj.in_features
    total = (len(mixer.conv1d.weight) - d_inner) // 2 if mamba2 else mixer.A_log.shape[1]  # states, all groups together
    gone = torch.tensor(sorted(set(range(total)) - set(kept)))
    with torch.no_grad():
        if not mamba2:
            rank = mixer.dt_proj.in_features
            mixer.x_proj.weight[torch.cat([rank + gone, rank + total + gone])] = 0
            return
        channels = torch.cat([d_inner + gone, d_inner + total + gone])
        mixer.in_proj.weight[d_inner + channels] = 0
        mixer.conv1d.weight[channels] = 0
        mixer.conv1d.bias[channels] = 0
