"""Personalized RLHF in JAX. The public names are those of `__init__.pyi`; each is imported when it is first used."""

import os
import sys

# The command, or `python -m` while it looks for a program of this package: what follows takes a while to import.
if os.path.basename(sys.argv[0] if sys.argv else "") in ("pjrlhf", "-m"):
    from pjrlhf.errors import exit_on_signals

    exit_on_signals()

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
