"""GGUF files whose header lies about what the file holds."""

import struct

import gguf
import numpy as np
import pytest

from lomo_jax.errors import UserError
from lomo_jax.models import gguf_file

UINT32, STRING, ARRAY = 4, 8, 9


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def header(num_tensors=0, num_keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def tensor(name="t", shape=(4,), kind=0, offset=0):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def array(kind, length):
    return string("k") + struct.pack("<IIQ", ARRAY, kind, length)


def padded(content, data):
    return content + bytes(-len(content) % 32) + data


def nested(depth):
    inner = struct.pack("<IQ", UINT32, 0)
    return array(ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * depth + inner


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mmap an empty file"),
        (b"GGML" + bytes(40), "does not start with GGUF"),
        (header(version=1), "version 1; supported: 2, 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648; supported: 2, 3, little"),
        (header(num_keys=2**62), "it ends before byte"),
        (header(num_tensors=2**62), "it ends before byte"),
        (header(num_keys=1) + array(UINT32, 2**62), "it ends before byte"),
        (header(num_keys=1) + array(STRING, 2**62) + bytes(80), "it ends before byte"),
        (header(num_keys=1) + nested(100_000), "unknown type 9"),
        (header(num_keys=1) + struct.pack("<Q", 2**63) + bytes(40), "it ends before byte"),
        (header(num_keys=1) + string("k") + struct.pack("<I", 77), "unknown type 77"),
        (header(num_keys=2) + 2 * (string("k") + struct.pack("<II", UINT32, 1)), "'k' is there tw"),
        (header(num_keys=1) + b"\1\0\0\0\0\0\0\0\xff", "codec can't decode byte 0xff"),
        (padded(header(2) + 2 * tensor(), bytes(99)), "the tensor 't' is there twice"),
        (padded(header(1) + tensor(), bytes(15)), "it ends before byte"),
        (padded(header(1) + tensor(offset=2**63), bytes(16)), "it ends before byte"),
        (padded(header(1) + tensor(shape=(2**63, 2**63)), bytes(16)), "it ends before byte"),
        (padded(header(1) + tensor(shape=(1,) * 5), bytes(16)), "'t' has 5 dimensions"),
        (padded(header(1) + tensor(kind=999), bytes(16)), "'t' has the unknown type 999"),
        (padded(header(1) + tensor(kind=2), bytes(99)), "rows that are not whole blocks"),
    ],
)
def test_a_header_that_lies_is_one_line(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"x\.gguf is truncated or not a GGUF .*{message}"
    ) as caught:
        gguf_file.read(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path):
    key = string("general.alignment") + struct.pack("<II", UINT32, 0)
    (tmp_path / "x.gguf").write_bytes(header(num_keys=1) + key)
    with pytest.raises(UserError, match=r"general\.alignment=0 is not a power of two"):
        gguf_file.read(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K"])
def test_values_are_those_of_the_package_gguf(tmp_path, kind):
    kind = getattr(gguf.GGMLQuantizationType, kind)
    values = np.random.default_rng(0).normal(size=(3, 2, 256)).astype(np.float32)
    try:
        data = gguf.quantize(values, kind)
    except NotImplementedError:  # it only reads this type
        data = np.random.default_rng(0).integers(0, 99, (3, 2, gguf.GGML_QUANT_SIZES[kind][1]))
        data = data.astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("a", 7)
    writer.add_array("b", ["x", "\u2603"])
    writer.add_array("c", [1.5, 2.5])
    writer.add_tensor("t", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, (tensor,) = gguf_file.read(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {name: x for name, x in theirs.items() if not name.startswith("GGUF.")}
    assert (tensor.name, tensor.shape) == ("t", (3, 2, 256))
    expected = gguf.dequantize(reader.tensors[0].data, kind).reshape(3, 2, 256)
    np.testing.assert_array_equal(tensor.read(), expected)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    i64 = int(gguf.GGMLQuantizationType.I64)
    (tmp_path / "x.gguf").write_bytes(padded(header(1) + tensor(shape=(1,), kind=i64), bytes(8)))
    _, (found,) = gguf_file.read(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="the tensor t is stored as I64"):
        found.read()
