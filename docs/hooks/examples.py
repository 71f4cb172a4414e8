"""Docstrings end in "Example:", which griffe knows as "Examples:" only."""

import re

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which its doctests are set as code."""

    def on_instance(self, *, obj, **kwargs):
        """Renames the section of one object."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = text
