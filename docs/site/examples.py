"""Docstrings say "Example:", which griffe takes for a note; this makes a section of examples of it."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section when an object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
