"""Other people's datasets into the store, and back where the format is worth writing. One module a format, named in core.FORMATS, each with:

a docstring whose first line says what it looks for; detects(path) -> bool, cheap; read(path, *, options) -> Source; and where it can be written,
write(store, path) -> notes, which makes path (a file or folder that is not there yet; convert moves it into its place) and returns what was left out.
"""
from policy.data.convert.core import FORMATS, Converted, convert, detect, open_source
from policy.data.convert.mapping import Rules
from policy.data.convert.source import Episode, Source

__all__ = ["FORMATS", "Converted", "Episode", "Rules", "Source", "convert", "detect", "open_source"]
