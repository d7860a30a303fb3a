"""sphinx-build -W -b html docs docs/_build/html

Needs no network: no intersphinx. What can be read from the code (configuration, methods, verbs,
API) is read from it at build time, by `_ext/reference.py`.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "88"  # of the verbs' help
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flexlora"
copyright = "the flexlora authors, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "reference",
]
html_theme = "furo"
html_title = "flexlora"
exclude_patterns = ["_build", "_ext", "figures"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `code` as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
