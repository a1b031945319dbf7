"""Data for language models: read, tokenised, packed into rows, in an order that resumes exactly.

Modules are imported at the first use of their names: `resolve` needs no Grain.
"""

from typing import TYPE_CHECKING

from lomo_jax import _lazy

if TYPE_CHECKING:
    from lomo_jax.data.dataset import Rows as Rows
    from lomo_jax.data.dataset import Summary as Summary
    from lomo_jax.data.dataset import TextSplits as TextSplits
    from lomo_jax.data.dataset import read_rows as read_rows
    from lomo_jax.data.dataset import text_dataset as text_dataset
    from lomo_jax.data.kinds import read_template as read_template
    from lomo_jax.data.packing import Batch as Batch
    from lomo_jax.data.packing import PackedRows as PackedRows
    from lomo_jax.data.sources import package_path as package_path
    from lomo_jax.data.sources import resolve as resolve

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        "dataset": ["Rows", "Summary", "TextSplits", "read_rows", "text_dataset"],
        "kinds": ["read_template"],
        "packing": ["Batch", "PackedRows"],
        "sources": ["package_path", "resolve"],
    },
)
