"""`lomo-jax train` in a checkout of lomo_jax.

    python train.py --config configs/llama7b.py --config.model.path=DIR --config.data.path=TEXT

`python train.py --help` prints the usage; it is the docstring of lomo_jax/training/__main__.py.
"""

import sys

from lomo_jax.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
