"""These functions change JSON files on disk a little."""

import json


def change_json(path, **changes):
    """Replace or add top-level keys of the object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
