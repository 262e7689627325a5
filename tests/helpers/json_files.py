"""Small changes to JSON files on disk."""

import json


def change_json(path, **changes):
    """Replace or add top-level keys of the object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
