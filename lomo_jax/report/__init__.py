"""One self-contained HTML page about a run of `train.py`, or about several side by side."""

from lomo_jax.report.page import make as make
from lomo_jax.report.read import Run as Run
from lomo_jax.report.read import read as read
