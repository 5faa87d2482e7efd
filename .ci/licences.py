"""Licences of all that `pip install .` brings, as a Markdown table; fails on one that binds users of the package.

python .ci/licences.py [EXTRA ...]
"""

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "pjrlhf"
BINDING = re.compile(r"(?<!L)GPL|Affero|GNU General Public", re.IGNORECASE)  # not the LGPL
# Distributions whose metadata has the text of a licence in place of its name, or nothing -> the name.
KNOWN = {"dill": "BSD-3-Clause", "promise": "MIT"}


def needed(extras: tuple[str, ...]) -> list[metadata.Distribution]:
    """The installed distributions that the package needs, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(PACKAGE, ("", *extras))]
    while waiting:
        name, wanted = waiting.pop()
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key not in found:
                found[key] = metadata.distribution(key)
                waiting.append((key, ("", *requirement.extras)))
    return [found[key] for key in sorted(found)]


def licence(distribution: metadata.Distribution) -> str:
    """Its SPDX expression, else its classifiers, else the first line of what it says."""
    about = distribution.metadata
    if about.get("License-Expression"):
        return about["License-Expression"]
    classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    names = [line.rpartition(" :: ")[2] for line in classifiers if line.count(" :: ") > 1]
    said = (about.get("License") or "").strip().splitlines()
    return KNOWN.get(about["Name"]) or " and ".join(names) or (said[0] if said else "not stated")


def main(extras: tuple[str, ...]) -> int:
    print("| package | version | licence |\n|---|---|---|")
    binding = []
    for distribution in needed(extras):
        name, text = distribution.metadata["Name"], licence(distribution)
        print(f"| {name} | {distribution.version} | {text} |")
        if BINDING.search(text) and " OR " not in text:
            binding.append(name)
    for name in binding:
        print(f"{name}: its licence binds what is built on it; replace it, or make it an extra", file=sys.stderr)
    return int(bool(binding))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
