"""Text for language models: read, tokenised, packed into rows, in an order that resumes exactly.

Modules are imported at the first use of their names: `package_path` needs no Grain.
"""

from typing import TYPE_CHECKING

from lomo_jax import _lazy

if TYPE_CHECKING:
    from lomo_jax.data.documents import package_path as package_path
    from lomo_jax.data.packing import Batch as Batch
    from lomo_jax.data.text import TextSplits as TextSplits
    from lomo_jax.data.text import text_dataset as text_dataset

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        "documents": ["package_path"],
        "packing": ["Batch"],
        "text": ["TextSplits", "text_dataset"],
    },
)
