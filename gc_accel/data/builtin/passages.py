"""The built-in questions and passages: arithmetic on the number words, where matching words are not enough.

A passage says something about a number from 0 to 9999 in English words; a question asks for that number in
digits, or by way of another number, in digits or in words:

    what is 4127                                          four thousand one hundred and twenty-seven is odd
    what comes after 4126                                 (the same)
    what comes before four thousand one hundred and ...   (the same)

So a question shares no word with its passage, or shares most of them with wrong passages too: the number that it
names is not its answer. Every tenth number, drawn once and for all, is held out: its passage takes no part in the
training, neither as a positive nor as a hard negative, and every test question is answered by such a passage.
"""

from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import Digits, Sequence, Whitespace
from transformers import BertConfig, PreTrainedTokenizerFast

from gc_accel.data.builtin.scans import Split, check_split
from gc_accel.data.builtin.words import WORDS, number_in_words, word_tokenizer

NUMBERS = 10_000
HELD_OUT = NUMBERS // 10
# The answer minus the number that is named, by the form of a question.
QUESTIONS = {"what is {}": 0, "what comes after {}": 1, "what comes before {}": -1}
NEAR = np.array([1, 2, 10, 100, 1000])  # a hard negative differs from the answer by one of these
SENTENCE = "what is comes after before odd even and -"  # the words that are no numbers
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
MAX_TOKENS = 24


def passage(number: int) -> str:
    """The passage about a number."""
    return f"{number_in_words(number)} is {'odd' if number % 2 else 'even'}"


def question(answer: int, form: str, *, in_words: bool) -> str:
    """A question of one of the forms in `QUESTIONS` that `answer` answers."""
    named = answer - QUESTIONS[form]
    return form.format(number_in_words(named) if in_words else named)


def held_out_numbers() -> np.ndarray:
    """The numbers `(1000,)` whose passages no training sample has, the same for every seed."""
    return np.random.default_rng(0).permutation(NUMBERS)[:HELD_OUT]


class NumberPassages(torch.utils.data.Dataset[dict[str, Any]]):
    """Questions, their passages, and hard negatives about nearby numbers.

    An item is `{"query": str, "positive": str, "negatives": [str, ...]}`. Training questions are drawn with
    replacement from about 45,000, those of the test split all have different answers.

    Args:
        split: decides which numbers are answers; hard negatives are any numbers in "test".
        size: how many questions. In the train split, a smaller set is the beginning of a larger one.
        negatives: how many hard negatives each question has, up to 5.
        seed: draws answers, forms and negatives. It does not move numbers between the splits.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, split: Split, *, size: int, negatives: int = 1, seed: int = 0) -> None:
        check_split(split)
        if split == "test" and size > HELD_OUT:
            raise ValueError(f"expected size of at most {HELD_OUT}, the numbers held out, got {size}")
        if not 0 <= negatives <= len(NEAR):
            raise ValueError(f"expected from 0 to {len(NEAR)} negatives, got {negatives}")
        self.seed, self.split, self.negatives = seed, split, negatives
        held_out = held_out_numbers()
        rng = np.random.default_rng((seed, split == "test"))
        if split == "test":
            self.answers = rng.permutation(held_out)[:size]
            self.allowed = np.ones(NUMBERS, dtype=bool)
        else:
            self.allowed = ~np.isin(np.arange(NUMBERS), held_out)
            self.answers = rng.choice(np.flatnonzero(self.allowed), size)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        answer = int(self.answers[index])
        rng = np.random.default_rng((self.seed, self.split == "test", index))
        return {
            "query": self._ask(answer, rng),
            "positive": passage(answer),
            "negatives": [passage(number) for number in self._near(answer, rng)],
        }

    def _ask(self, answer: int, rng: np.random.Generator) -> str:
        forms = [form for form, shift in QUESTIONS.items() if 0 <= answer - shift < NUMBERS]
        form = forms[rng.integers(len(forms))]
        return question(answer, form, in_words=bool(QUESTIONS[form] and rng.integers(2)))

    def _near(self, answer: int, rng: np.random.Generator) -> list[int]:
        near = np.unique(answer + np.outer([1, -1], NEAR))
        near = near[(near >= 0) & (near < NUMBERS)]
        return rng.permutation(near[self.allowed[near]])[: self.negatives].tolist()


def passages_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of this data: one token per word and per digit."""
    words = [*SPECIAL, *SENTENCE.split(), *WORDS.split(), *"0123456789"]
    return word_tokenizer(words, Sequence([Whitespace(), Digits(individual_digits=True)]), MAX_TOKENS)


def passages_config(*, width: int = 64, layers: int = 2, heads: int = 4) -> BertConfig:
    """Configure a BERT that one core can train, without dropout, as it sees each question only once or twice."""
    tokenizer = passages_tokenizer()
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
