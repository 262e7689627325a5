"""These functions change JSON files on disk a little."""

import json

from quantize.artifact.manifest import digest_of
from quantize.artifact.writer import as_json
from quantize.checkpoint.files_seen import sha256


def bytes_for_programs(artifact):
    """Return the bytes of an artifact without its page, its model card and the page's figures in the manifest."""
    files = (x for x in artifact.directory.iterdir() if x.name not in ("report.html", "README.md"))
    return sum(x.stat().st_size for x in files) - len(as_json({"report": artifact.manifest["report"]}))


def change_json(path, **changes):
    """Replace or add top-level keys of the object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sign_again(directory, **changes):
    """Change an artifact's manifest, and keep its hashes and its digest true, as whoever made the artifact could."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    if "files" not in changes:
        files = (x for x in directory.rglob("*") if x.is_file() and x != path)
        manifest["files"] = {str(x.relative_to(directory)): sha256(x) for x in sorted(files)}
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
