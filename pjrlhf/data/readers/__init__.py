"""Readers of published data sets, one module each, loaded when a config names it. docs/data.md describes them."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pjrlhf.data.readers.reader import DataReader

# Kind in a config -> module of this package, which has the reader as `READER`, or several as `READERS` by kind.
MODULES = {
    "alignx": "alignx",
    "alpaca_eval": "prompt_sets",
    "beavertails": "beavertails",
    "cardinal_prefs": "cardinal_prefs",
    "collective_alignment": "collective_alignment",
    "compred": "shp",
    "helpsteer2": "helpsteer2",
    "hh_rlhf": "hh",
    "koala": "prompt_sets",
    "lamp": "lamp",
    "personal_llm": "personal_llm",
    "personal_rewardbench": "personal_rewardbench",
    "personamem": "personamem",
    "pku_saferlhf": "pku_saferlhf",
    "prism": "prism",
    "psoups": "psoups",
    "rfm": "rfm",
    "shp": "shp",
    "tldr": "tldr",
    "ultrafeedback": "ultrafeedback",
    "vpl_hh": "hh",
}


def reader_of(kind: str) -> "DataReader":
    """The reader of one of `MODULES`."""
    module = importlib.import_module(f"{__name__}.{MODULES[kind]}")
    return module.READERS[kind] if hasattr(module, "READERS") else module.READER
