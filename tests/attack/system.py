"""`perllm up` as a process, its parts each the user of its role and its API for those with a key:
`python -m attack.system up --edges 2 ...`.

What restarts a part that ends is the product's own supervisor. The commands of the parts are kept in `PARTS`, so that
who watches knows which process is which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import users

from perllm.broker.cli import main, system
from perllm.broker.local.supervisor import Supervisor
from perllm.broker.settings import Settings

#: A file in the data folder: name of each part → its command.
PARTS = "parts.json"
_ROLES = {"edge": "worker", "flower": "monitor"}


class System(Supervisor):
    """The product's stack of edges only."""

    def __init__(self, settings: Settings, **given: Any) -> None:
        super().__init__(settings, **(given | {"clouds": ()}))
        self._commands: dict[str, list[str]] = {}

    def _launch(self, name: str, command: list[str], **environment: str) -> None:
        part = name.partition(".")[0]
        own = {"PERLLM_REDIS_URL": users.url_of(_ROLES.get(part, part), self.url), "PERLLM_API_OPEN": "false"}
        super()._launch(name, command, **{**environment, **own})
        self._commands[name] = command
        (self.settings.data_dir / PARTS).write_text(json.dumps(self._commands))


def parts(folder: Path) -> dict[str, list[str]]:
    """The commands of the parts started so far."""
    try:
        return dict(json.loads((folder / PARTS).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # not yet, or being written
        return {}


if __name__ == "__main__":
    system.Supervisor = System  # type: ignore[misc]
    main.main()
