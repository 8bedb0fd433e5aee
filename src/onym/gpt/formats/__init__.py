"""Other programs' layouts of our models, one adapter a file, in the order in which they are tried."""

from onym.gpt.formats.book import BOOK
from onym.gpt.formats.book_decoder import BOOK_LLAMA3, BOOK_QWEN3
from onym.gpt.formats.book_fast import BOOK_FAST
from onym.gpt.formats.gguf import GGUF_DECODER, GGUF_GPT2
from onym.gpt.formats.huggingface import HUGGINGFACE
from onym.gpt.formats.huggingface_decoder import LLAMA, MISTRAL, QWEN2, QWEN3
from onym.gpt.formats.litgpt import LITGPT
from onym.gpt.formats.nanogpt import NANOGPT
from onym.gpt.formats.recognised import NANOCHAT, OTHER
from onym.gpt.formats.torchtitan import TORCHTITAN

_GPT2 = (BOOK, BOOK_FAST, NANOGPT, HUGGINGFACE)
_DECODERS = (BOOK_LLAMA3, BOOK_QWEN3, LLAMA, QWEN2, QWEN3, MISTRAL, LITGPT, TORCHTITAN)
_WRITTEN_ALONE = (GGUF_GPT2, GGUF_DECODER)
FORMATS = (*_GPT2, *_DECODERS, NANOCHAT, OTHER, *_WRITTEN_ALONE)
