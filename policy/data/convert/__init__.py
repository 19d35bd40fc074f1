"""Other people's datasets into the store, and back where the format is worth writing. One module a format, each with:

detects(path) -> bool, cheap and without its library; read(path) -> Source; and where it can be written, write(store, path, *, overwrite=False).
"""
