"""Text for language models: found, tokenised, packed into rows, in an order that can be resumed."""

from lomo_jax.data.documents import package_path
from lomo_jax.data.packing import Batch
from lomo_jax.data.text import Text, text_dataset

__all__ = ["Batch", "Text", "package_path", "text_dataset"]
