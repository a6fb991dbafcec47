"""A small random model, its folders, and a benchmark that takes a second."""

import html.parser

import torch
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.measure.timing import MIN_ROUNDS
from ssmc.runtime.models.checkpoints import write_checkpoint

KEPT = [0, 2, 5]  # of 8 states
CPU = torch.device("cpu")
SMALL = {"lengths": (8, 16), "batch_sizes": (1, 3), "decode_tokens": 4, "repeats": MIN_ROUNDS, "time_budget": 0.1}


def random_model(d_state: int = 8, seed: int = 0) -> MambaForCausalLM:
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        state_size=d_state,
        num_hidden_layers=2,
        time_step_rank=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MambaForCausalLM(config).eval()


def save(folder, tensors, config, format="transformers"):
    folder.mkdir()
    write_checkpoint(folder, tensors, config, format=format)


class Page(html.parser.HTMLParser):
    """What a page is made of: tags, attributes, ids and texts of headings."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.ids, self.headings, self.texts = [], [], [], [], []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        self._heading = tag == "h2"

    def handle_data(self, data):
        if self._heading and data.strip():
            self.headings.append(data.strip())
        self._heading = False
        self.texts.append(data)
