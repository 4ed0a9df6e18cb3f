"""Checksums are those that Google Cloud Storage keeps, and notice every flipped bit."""

import pytest

from dpojax import storage

# The check value of CRC-32C (Castagnoli), 0xE3069283 of the digits 1 to 9, in base64.
NINE_DIGITS = "4waSgw=="


def test_the_checksum_of_nine_digits_is_the_one_of_the_standard():
    assert storage.crc32c(b"123456789") == NINE_DIGITS


def test_files_of_a_folder_have_the_same_checksums_on_a_disk_and_on_a_bucket(folder):
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "digits").write_bytes(b"123456789")
    (folder / "empty").write_bytes(b"")
    assert storage.file_sizes(folder) == {"sub/digits": 9, "empty": 0}
    checksums = storage.checksums_of(folder, ["sub/digits", "empty"])
    assert checksums == {"sub/digits": (9, NINE_DIGITS), "empty": (0, "AAAAAA==")}
    with pytest.raises(FileNotFoundError):
        storage.checksums_of(folder, ["absent"])
    assert storage.file_sizes(folder / "absent") == {}


def test_a_file_that_ends_with_its_checksum_notices_every_flipped_bit_and_every_cut(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    storage.append_checksum(path)
    storage.require_checksum(path)
    whole = path.read_bytes()
    assert whole == b"123456789" + bytes.fromhex("e3069283")
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
        for i in range(len(whole))
        for bit in range(8)
    ]
    for content in [*flipped, *(whole[:n] for n in range(len(whole)))]:
        path.write_bytes(content)
        with pytest.raises(storage.StorageError, match=str(path)):
            storage.require_checksum(path)


def test_a_folder_gets_its_final_name_and_replaces_nothing(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        storage.move_folder(tmp_path / "new", tmp_path / "old")
    storage.move_folder(tmp_path / "new", tmp_path / "third")
    assert (tmp_path / "third" / "file").read_text() == "new"
    assert (tmp_path / "old" / "file").read_text() == "old"
