"""One self-contained HTML page about a run, or about several side by side."""

from lomo_jax.report.page import render as render
from lomo_jax.report.runs import Run as Run
from lomo_jax.report.runs import read as read
