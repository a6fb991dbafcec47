"""Small byte-level BPE tokenizers as published models have them, trained on a few lines."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "Once upon a time there was a small fox who lived in a wood, and it's said he'd 12345 friends.",
    "Il était une fois; naïve café über 3.14159 <tag>!?  \n\n\tindented   text",
    "def f(x):\n    return x ** 2  # 日本語 русский 🙂",
)
SIZE = 384
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-3": rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_OTHERS}",
    "other": r"\s+|\d+",
}


def tokenizer(kind="gpt-2", size=SIZE):
    """A tokenizer that splits text as GPT-2, GPT-NeoX, Llama 3 or Qwen2 do, or as nobody does."""
    found = Tokenizer(models.BPE())
    if kind in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt-neox":
        found.normalizer = normalizers.NFC()
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>", "<|turn|>"], initial_alphabet=alphabet)
    found.train_from_iterator(LINES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>", additional_special_tokens=["<|turn|>"])


def save(model, folder, kind="gpt-2", size=SIZE):
    """A model with such a tokenizer; its embedding has a few rows more."""
    model.save_pretrained(folder)
    tokenizer(kind, size).save_pretrained(folder)
    return folder
