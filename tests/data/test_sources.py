"""Which files are read, how, in which order, and the errors for bad ones."""

import bz2
import csv
import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from lomo_jax.data import package_path
from lomo_jax.data.sources import find, find_all
from lomo_jax.errors import UserError

RECORDS = [
    {"text": 'one, "two"\nthree', "n": "1"},
    {"text": "NA", "n": "2020-01-01"},
    {"text": "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "n": "None"},
]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"


def read(path: Path | str) -> list[dict]:
    found = find(str(path))
    return [record.columns for source in found.sources for record in source.read()]


def texts(path: Path | str) -> list[str]:
    return [record["text"] for record in read(path)]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


FORMATS = {
    "a.jsonl": lambda path: path.write_text(LINES),
    "lines.json": lambda path: path.write_text(LINES),
    "a.ndjson": lambda path: path.write_text(LINES.replace("\n", "\n\n")),
    "array.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "pretty.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2)),
    "array.jsonl": lambda path: path.write_text(json.dumps(RECORDS)),
    "lines.txt": lambda path: path.write_text(LINES),
    "lines.data": lambda path: path.write_text(LINES),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "a.csv": lambda path: write_csv(path, ","),
    "semicolon.csv": lambda path: write_csv(path, ";"),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: pd.DataFrame(RECORDS).to_parquet(path),
    "parquet.json": lambda path: pd.DataFrame(RECORDS).to_parquet(path),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "gz.jsonl": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(
        pa.Codec("zstd").compress(LINES.encode(), asbytes=True)
    ),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_list(RECORDS), test=datasets.Dataset.from_list(RECORDS[:1])
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str):
    FORMATS[name](tmp_path / name)
    assert read(tmp_path / name) == RECORDS


def test_arrow_files(tmp_path: Path):
    table = pa.Table.from_pylist(RECORDS)
    for name, new in {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}.items():
        with new(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
        assert read(tmp_path / f"{name}.arrow") == RECORDS


def test_a_nested_value_has_no_keys_of_other_records(tmp_path: Path):
    calls = [{"calls": [{"city": "Paris"}]}, {"calls": [{"day": 3, "hours": None}]}]
    pd.DataFrame(calls).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [calls[0], {"calls": [{"day": 3}]}]


def test_where_a_record_is(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(LINES.replace("\n", "\n\n"))
    write_csv(tmp_path / "a.csv", ",")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))

    def wheres(name: str) -> list[str]:
        [source] = find(str(tmp_path / name)).sources
        return [record.where.rpartition("/")[2] for record in source.read()]

    assert wheres("a.jsonl") == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]
    assert wheres("a.csv") == ["a.csv:3", "a.csv:4", "a.csv:5"]  # the last line of each
    assert wheres("a.json") == ["a.json, record 1", "a.json, record 2", "a.json, record 3"]


def test_a_folder_gives_text_files_at_any_depth(tmp_path: Path):
    for name in ("b.txt", "sub/a.md", "code.py", ".hidden.txt", ".git/c.txt", "D.TXT"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    assert texts(tmp_path) == ["D.TXT", "b.txt", "sub/a.md"]
    assert find(str(tmp_path)).left_out == [str(tmp_path / "code.py")]
    assert texts(tmp_path / "**" / "*.py") == texts(tmp_path / "code.py") == ["code.py"]


def test_the_card_of_a_dataset_is_no_text(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA dataset.")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data").mkdir()
    pd.DataFrame(RECORDS).to_parquet(tmp_path / "data" / "part-0.parquet")
    found = find(str(tmp_path))
    assert [source.name for source in found.sources] == [str(tmp_path / "data" / "part-0.parquet")]
    assert sorted(found.left_out) == [
        str(tmp_path / "README.md"),
        str(tmp_path / "dataset_infos.json"),
    ]
    assert read(tmp_path) == RECORDS


def test_a_folder_of_splits_gives_one(tmp_path: Path):
    for name in ("train-00000-of-00002.jsonl", "train-1.jsonl", "dev.jsonl", "test/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts(tmp_path) == ["train-00000-of-00002.jsonl", "train-1.jsonl"]
    assert texts(f"{tmp_path}:validation") == ["dev.jsonl"]
    assert texts(f"{tmp_path}:test") == ["test/a.jsonl"]
    with pytest.raises(UserError, match="has no split 'dev': its files are named test, train, va"):
        read(f"{tmp_path}:dev")


def write_each(folder: Path, *names: str) -> Path:
    """Writes files that hold their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        is_text = name.endswith((".txt", ".md"))
        (folder / name).write_text(name if is_text else json.dumps({"text": name}))
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train/a.txt", "test/b.txt", "README.md"), ["train/a.txt"]),
        (("a/train.txt", "a/test.txt", "b.txt"), ["a/test.txt", "a/train.txt", "b.txt"]),
        (("README.md", "test.txt", "valid.txt"), ["README.md", "test.txt", "valid.txt"]),
        (("data.jsonl", "test.jsonl"), ["data.jsonl"]),
        (("dev.jsonl", "test.jsonl"), ["dev.jsonl", "test.jsonl"]),
    ],
)
def test_a_folder_is_not_trained_on_its_test_split(tmp_path: Path, names, expected):
    assert texts(write_each(tmp_path, *names)) == expected


def test_quotes_in_tab_separated_values(tmp_path: Path):
    (tmp_path / "a.tsv").write_text(
        'text\tn\n"Hello," she said.\t1\n"Once\t2\nthe end"\t3\n"a ""b"""\t4\n\n"x\ty"\n'
    )
    expected = ['"Hello," she said.', '"Once', 'the end"', 'a "b"', '"x']
    assert texts(tmp_path / "a.tsv") == expected


def test_an_empty_shard(tmp_path: Path):
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(tmp_path / "0.parquet")
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "1.parquet")
    assert texts(tmp_path) == ["a"]


def test_a_split_of_a_saved_dataset(tmp_path: Path):
    FORMATS["splits"](tmp_path / "splits")
    assert read(f"{tmp_path}/splits:test") == RECORDS[:1]
    with pytest.raises(UserError, match=r"has no split 'nope': it has train, test$"):
        read(f"{tmp_path}/splits:nope")


def test_several_paths(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    found = find_all([str(tmp_path / "b.jsonl"), str(tmp_path / "a.txt")])
    assert [r.columns["text"] for s in found.sources for r in s.read()] == ["b", "a"]


@pytest.mark.parametrize("name", ["run[1]*", "a b", "x:y@z"])
def test_odd_names(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert texts(folder) == texts(folder / "a.txt") == ["a"]
    pd.DataFrame(RECORDS).to_parquet(folder / "a.parquet")
    assert read(folder) == RECORDS


def test_a_long_text_is_read_in_parts(tmp_path: Path):
    text = "0123456789\n" * 200_000
    (tmp_path / "a.txt").write_text(text)
    [source] = find(str(tmp_path / "a.txt")).sources
    records = list(source.read())
    assert "".join(record.columns["text"] for record in records) == text
    assert [record.continues for record in records] == [False, True, True]


def test_byte_order_mark_and_line_ends(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(tmp_path / "a.txt") == ["one\ntwo"]


def test_a_changed_file_has_another_identity(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    first = find(str(path)).sources[0].identity
    assert find(str(path)).sources[0].identity == first
    path.write_text("b")
    assert find(str(path)).sources[0].identity != first


GZ = gzip.compress(LINES.encode() * 1000)
BAD = {
    "a line that is no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
    "a first line that is none": ("a.jsonl", b'{"text":\n{"a": 1}', r"a\.jsonl:1 is not JSON"),
    "an array that is none": ("a.json", b'[{"text": 1},\n,]', r"a\.json line 2 is not JSON"),
    "a number": ("a.jsonl", b'{"text": "a"}\n1', r"a\.jsonl:2 is int, not a record"),
    "an array of texts": ("a.json", b'["a"]', r"a\.json, record 1 is str, not a record"),
    "nested too deeply": ("a.json", b"[" * 10**5, r"a\.json is not data: it is nested too deeply"),
    "Latin-1": ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 0xe9\)"),
    "Latin-1 in JSON": ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', r"a\.jsonl:2 is not UTF-8 text"),
    "zeros": ("a.txt", b"a\0\0", r"a\.txt is not text, it has a zero byte"),
    "a truncated gz": ("a.jsonl.gz", GZ[:-50], r"a\.jsonl\.gz cannot be read: Truncated"),
    "a truncated zst": (
        "a.jsonl.zst",
        pa.Codec("zstd").compress(LINES.encode() * 1000, asbytes=True)[:-50],
        r"a\.jsonl\.zst cannot be read: Truncated",
    ),
    "a truncated Parquet file": (
        "a.parquet",
        b"PAR1 and more",
        r"a\.parquet cannot be read: Parquet",
    ),
    "Arrow that is none": ("a.arrow", b"no arrow", r"a\.arrow cannot be read: "),
    "a value too many": ("a.csv", b"text,n\na,b,c\n", r"a\.csv:2 has 3 values for 2 columns"),
    "a value too few": ("a.csv", b"text,n\na\n", r"a\.csv:2 has 1 values for 2 columns"),
    "two columns of one name": ("a.csv", b"text,text\na,b\n", r"a\.csv has two columns 'text'"),
    "a huge number": ("a.jsonl", b'{"a": 1%s}' % (b"0" * 5000), r"a\.jsonl:1 cannot be read: Exc"),
    "an open quote": ("a.csv", b'text,n\na,"b\n', r"a\.csv:\d is not CSV: unexpected end of data"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/{message}") as error:
        read(tmp_path / file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "missing.txt does not exist: give a file, a folder or a glob, or OWNER/N"),
        ("*.txt", "matches no file"),
        ("a.py:train", r"a.py is a file, which has no splits: leave out :train"),
        ("", r"has no \.txt, \.md, \.jsonl, .* file: select other files with a glob"),
    ],
)
def test_a_missing_file_is_one_line(tmp_path: Path, name: str, message: str):
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_package_path():
    assert Path(package_path("json", "decoder.py")).read_text()
    assert texts("package://json/decoder.py") == [Path(json.decoder.__file__).read_text()]
    with pytest.raises(UserError, match="pip install --no-deps no_such_package"):
        package_path("no_such_package", "x")
    with pytest.raises(UserError, match="'json' has no 'a/b'"):
        package_path("json", "a", "b")
