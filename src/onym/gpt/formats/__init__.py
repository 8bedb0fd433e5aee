"""Other programs' layouts of GPT-2, one adapter a file, in the order in which they are tried."""

from onym.gpt.formats.book import BOOK
from onym.gpt.formats.book_fast import BOOK_FAST
from onym.gpt.formats.huggingface import HUGGINGFACE
from onym.gpt.formats.nanogpt import NANOGPT
from onym.gpt.formats.recognised import LITGPT, LLAMA, NANOCHAT

FORMATS = (BOOK, BOOK_FAST, NANOGPT, HUGGINGFACE, LITGPT, NANOCHAT, LLAMA)
