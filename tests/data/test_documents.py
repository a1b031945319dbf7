"""Which files are read, how they are split into documents, and the errors for bad ones."""

import json
from pathlib import Path

import pytest

from lomo_jax.data import package_path
from lomo_jax.data.documents import read_documents
from lomo_jax.errors import UserError


def read(path: Path | str, part_size: int = 1000, **kwargs: str) -> list[str]:
    return list(read_documents(str(path), part_size=part_size, **kwargs))


def test_folder_yields_text_files_at_any_depth(tmp_path: Path):
    for name in ("b.txt", "sub/a.md", "code.py", ".hidden.txt", ".git/c.txt", "D.TXT"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert sorted(read(tmp_path)) == ["D.TXT", "b.txt", "one", "sub/a.md", "two"]
    assert read(tmp_path) == read(tmp_path)
    assert read(tmp_path / "**" / "*.py") == ["code.py"]
    assert read(tmp_path / "code.py") == ["code.py"]


def test_folder_with_glob_characters_in_its_name(tmp_path: Path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert read(folder) == ["a"]


def test_other_key(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "no", "body": "yes"}))
    assert read(file, text_key="body") == ["yes"]


def test_blank_documents_are_skipped(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": "c"}')
    assert read(tmp_path) == ["b", "c"]


def test_byte_order_mark_and_line_ends(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(file) == ["one\ntwo"]


def test_long_file_is_split_at_blank_lines(tmp_path: Path):
    file = tmp_path / "a.txt"
    paragraph = "0123456789\n" * 5 + "\n"
    file.write_text(paragraph * 100)
    parts = read(file, part_size=200)
    assert "".join(parts) == paragraph * 100
    assert len(parts) > 20
    assert all(200 <= len(part) <= 200 + len(paragraph) for part in parts[:-1])
    assert all(part.startswith("0") and part.endswith("9\n\n") for part in parts)


@pytest.mark.parametrize("text", ["0123456789\n" * 500, "0123456789" * 500])
def test_long_file_without_blank_lines_is_split_too(tmp_path: Path, text: str):
    file = tmp_path / "a.txt"
    file.write_text(text)
    parts = read(file, part_size=100)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 300


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '{"body": "a", "id": 1}', r"a\.jsonl:1 has no 'text' \(found: body, id\)"),
        ("a.jsonl", '{"text": "a"}\n[1]', r"a\.jsonl:2 has no 'text' \(found: list\)"),
        ("a.jsonl", '{"text": 3}', r"a\.jsonl:1: 'text' is int, not text"),
        ("a.jsonl", r'{"text": "\ud800"}', r"a\.jsonl:1: 'text' has half of a surrogate pair"),
        ("a.txt", "", r"a\.txt has no text"),
        ("a.txt", " \n\n", r"a\.txt has no text"),
        ("a.jsonl", "\n", r"a\.jsonl has no text"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 0xff\)"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 text"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: str | bytes, message: str):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "missing.txt does not exist"),
        ("*.txt", "matches no file"),
        ("", r"has no \.txt, \.md, \.jsonl file"),
    ],
)
def test_missing_file(tmp_path: Path, name: str, message: str):
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_package_path():
    assert Path(package_path("json", "decoder.py")).read_text()
    with pytest.raises(UserError, match="pip install --no-deps no_such_package"):
        package_path("no_such_package", "x")
    with pytest.raises(UserError, match="'json' has no 'a/b'"):
        package_path("json", "a", "b")
