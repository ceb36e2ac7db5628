"""Numbers in English words, and tokenizers with one token per word: the texts of the built-in data sets."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
"""
ONES, TENS = WORDS.split()[:20], WORDS.split()[20:28]


def number_in_words(n: int) -> str:
    """English words for 0 to 9999, with the British "and": 3005 is "three thousand and five".

    Raises:
        ValueError: ``n`` is out of range.
    """
    if not 0 <= n <= 9999:
        raise ValueError(f"expected a number from 0 to 9999, got {n}")
    if n < 20:
        return ONES[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    size, unit = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = divmod(n, size)
    joint = " and " if rest < 100 else " "
    return f"{ONES[head]} {unit}" + (joint + number_in_words(rest) if rest else "")


def word_tokenizer(
    words: Sequence[str], pre_tokenizer: PreTokenizer, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, numbered in their order, and texts between <start> and <end>.

    Args:
        words: the vocabulary, with <pad>, <start>, <end> and <unk>.
        pre_tokenizer: cuts a text into words.
        max_length: tokens of a text at most.
    """
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    ends = [(word, words.index(word)) for word in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
