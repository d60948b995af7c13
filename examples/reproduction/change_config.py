"""Change switches of a converted model that no option of convert.py has.

python examples/reproduction/change_config.py MODEL '{"fusion": {"norm": false}}'
"""

import json
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    folder, changes = argv
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for branch, switches in json.loads(changes).items():
        config[branch] |= switches
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(path)


if __name__ == "__main__":
    main(sys.argv[1:])
