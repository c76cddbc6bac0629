"""Sphinx settings of the site that ``docs/build.py`` makes."""

import sys
from pathlib import Path

import surgery

sys.path.insert(0, str(Path(__file__).parent))

project, author, release = "surgery", "the surgery developers", surgery.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_extension",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"surgery {release}"
html_copy_source = False
html_show_copyright = False
smartquotes = False  # "--model" is no dash
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "ignore-module-all": True}  # what a module defines, not what it passes on
maximum_signature_line_length = 90
napoleon_use_ivar = True  # fields of a class are described once
suppress_warnings = ["ref.python"]  # a short name in a signature may be that of several classes
toc_object_entries_show_parents = "hide"
