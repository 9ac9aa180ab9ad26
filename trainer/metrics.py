"""metrics.jsonl: one line a thing that happened, for people, plots and the live display.

The table of all names with units and meanings is docs/metrics.md's. Every line has `phase` (teacher, sft, rl, eval), `step`, `version` and `wall_s` (since the run began). Further keys are
named like what they measure, units last: `reward_mean`, `held_out_success`, `staleness_mean`, `kl_k2`, `lr`, `step_s`, …
The file is only ever appended to, a whole line at a time; a line that a crash cut short is dropped on resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsFile:
    """Append lines; read back what an earlier life of this run wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # Cut, not written anew: a full disk, or a kill in between, would cost all that was said before.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._said = {_identity(line) for line in self.lines()}

    def write(self, line: dict[str, Any]) -> bool:
        """Append one line, unless it was said before: a resumed run repeats what it is not sure it said.

        Returns whether it was new.
        """
        if _identity(line) in self._said:
            return False
        self._said.add(_identity(line))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _rounded(value) for key, value in line.items()}) + "\n")
        return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield every line written so far."""
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)


def _identity(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["phase"], line["step"], line["version"]


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
