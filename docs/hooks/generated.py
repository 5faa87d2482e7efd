"""Pages that the code writes: settings, from their dataclasses, and the Python API, from the stub of the package."""

import pathlib
import sys

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference


def on_files(files, config):
    for place, content in reference.pages().items():
        files.append(File.generated(config, place, content=content))
    return files
