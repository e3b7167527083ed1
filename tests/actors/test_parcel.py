"""A model folder's files reach a node that does not see them, and nothing of them stays there."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import parcel
from actors.parcel import Source, packed, unpack


def model_folder(folder: Path) -> dict[str, bytes]:
    content = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 9, "empty": b""}
    (folder / "control").mkdir(parents=True)
    (folder / "control" / "model.safetensors").write_bytes(b"another model")
    for name, some in content.items():
        (folder / name).write_bytes(some)
    return content


def test_files_come_as_they_are_and_folders_below_do_not(tmp_path: Path) -> None:
    content = model_folder(tmp_path / "model")
    (tmp_path / "copy").mkdir()
    unpack(packed(tmp_path / "model"), tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == content


@pytest.mark.parametrize("node", ["", "here"])
def test_who_sees_the_folder_reads_it(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "own_node", lambda: "here")
    with Source("/somewhere", "v", node).opened() as folder:
        assert folder == Path("/somewhere")


def test_another_node_has_a_copy_as_long_as_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = model_folder(tmp_path / "model")
    monkeypatch.setattr(parcel, "own_node", lambda: "far")
    monkeypatch.setattr(parcel.ray, "get", lambda files: files)
    with Source(str(tmp_path / "model"), "v", "here", packed(tmp_path / "model")).opened() as folder:
        assert folder != tmp_path / "model" and {file.name: file.read_bytes() for file in folder.iterdir()} == content
    assert not folder.exists()
