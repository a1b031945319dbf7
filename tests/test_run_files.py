"""Where metrics go; TensorBoard and Weights & Biases are in test_resume.py, with whole runs."""

import json
import math

from lomo_jax.run_files import MetricsWriter


def test_a_records_file_is_valid_json_lines(tmp_path):
    file = MetricsWriter(tmp_path)
    file.write({"step": 1, "loss": 0.5})
    file.write({"step": 2, "loss": math.nan})
    # Readable before it is closed: users may read it at any time.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    file.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]


def test_appending_removes_an_unfinished_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')  # of a process that was killed
    file = MetricsWriter(tmp_path)
    file.write({"step": 2})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
