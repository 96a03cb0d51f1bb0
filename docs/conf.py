"""The documentation site: ``make docs``.

Nothing is fetched and nothing needs a GPU. ``HFLOW_FAST_INTERSPHINX=1`` links types to the pages of Python and PyTorch,
which it fetches.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import generate  # noqa: E402

import hflow_fast  # noqa: E402
from hflow_fast.configs.section import Section  # noqa: E402

project = "hflow_fast"
author = "the hflow_fast developers"
version = release = hflow_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
nitpicky = True
# What lies outside this package is linked by intersphinx, or not at all.
nitpick_ignore_regex = [("py:.*", r"(?!hflow_fast\.).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config, pieces"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "hflow_fast"
html_copy_source = False

if os.environ.get("HFLOW_FAST_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

generate.write_pages(Path(__file__).parent / "reference")


def _leave_unlinked(app, environment, node, content):
    """Type aliases and the like that a module keeps to itself have no place to link to."""
    target = node.get("reftarget", "")
    return content if target.startswith("hflow_fast.") and not generate.is_public(target) else None


def _keep_colons(app, what, name, value, options, lines):
    """Napoleon takes "a: b" in the first line of an attribute's docstring for "type: text"; ours have no types there."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment, now the first line


def _shorten_signature(app, what, name, value, options, signature, annotation):
    """Sections of the configuration are read from files, and their fields follow."""
    return ("", None) if isinstance(value, type) and issubclass(value, Section) else None


def _unlink_folders(app, page, text):
    """Links to folders of the repository open on its web page; the site has only the files that are linked to."""

    def shown(link):
        return link[1] if (Path(app.srcdir) / link[2]).is_dir() else link[0]

    text[0] = re.sub(r"\[([^\]]+)\]\((\.\.[^)#]*)\)", shown, text[0])


def setup(app):
    app.connect("source-read", _unlink_folders)
    app.connect("missing-reference", _leave_unlinked)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _shorten_signature)
