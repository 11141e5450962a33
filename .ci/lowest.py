"""The lowest version of every dependency that pyproject.toml allows, as constraints for pip.

python .ci/lowest.py > lowest.txt         print them
python .ci/lowest.py --check              fail if another version is installed in this environment
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path


def lowest() -> dict[str, str]:
    """Return name -> version, of the package and of what its tests need."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", text)
        if match is None:
            raise SystemExit(f"pyproject.toml: '{text}' names no lowest version")
        found[match[1]] = match[2]
    return found


def same(wanted: str, found: str) -> bool:
    """Tell whether two versions are equal, however many zeros they end in."""
    bare = [re.sub(r"(\.0)+$", "", text.partition("+")[0]) for text in (wanted, found)]
    return bare[0] == bare[1]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        wrong = [f"{name} {version(name)}, not {low}" for name, low in lowest().items() if not same(low, version(name))]
        raise SystemExit(f"installed: {'; '.join(wrong)}" if wrong else 0)
    print("\n".join(f"{name}=={low}" for name, low in lowest().items()))
