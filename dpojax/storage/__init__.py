"""The one door to storage: local folders, `gs://` and `s3://` buckets, over `etils.epath`.

Files are written whole or not at all. A bucket has no rename, no file lock, no hard link and no
memory map: the functions here say what they do instead.
"""

from dpojax.storage.checksums import (
    Checksum,
    append_checksum,
    checksums_of,
    crc32c,
    file_sizes,
    require_checksum,
)
from dpojax.storage.contents import content_hash, local_copy, recorded_hashes
from dpojax.storage.files import (
    damage_named,
    free_bytes,
    move_folder,
    read_json,
    read_text,
    remove_folder,
    remove_unfinished,
    replacing,
    replacing_folder,
    share_folder,
    write_bytes,
    write_json,
    write_text,
)
from dpojax.storage.lines import (
    LineWriter,
    read_lines,
    read_records,
    rewrite_records,
)
from dpojax.storage.locks import Locked, lock, lock_in_turn, lost_locks, turn
from dpojax.storage.paths import Path, StorageError, as_path, is_local, matches

__all__ = [
    "Checksum",
    "LineWriter",
    "Locked",
    "Path",
    "StorageError",
    "append_checksum",
    "as_path",
    "checksums_of",
    "content_hash",
    "crc32c",
    "damage_named",
    "file_sizes",
    "free_bytes",
    "is_local",
    "local_copy",
    "lock",
    "lock_in_turn",
    "lost_locks",
    "matches",
    "move_folder",
    "read_json",
    "read_lines",
    "read_records",
    "read_text",
    "recorded_hashes",
    "remove_folder",
    "remove_unfinished",
    "replacing",
    "replacing_folder",
    "require_checksum",
    "rewrite_records",
    "share_folder",
    "turn",
    "write_bytes",
    "write_json",
    "write_text",
]
