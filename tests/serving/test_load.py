"""A server at saturation for half a minute; benchmarks/load.py says what must hold."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_saturated_server_loses_and_mixes_up_nothing(tmp_path):
    output = tmp_path / "load.json"
    command = [sys.executable, ROOT / "benchmarks" / "load.py", "--seconds", "30", "--output", output]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    counts = found["load"]["counts"]
    assert found["wrong"] == 0 and counts["answered"] > 200
    assert counts["429"] > 0 and counts["left"] > 0 and counts["malformed"] > 0
    assert found["SIGTERM"]["exit_code"] == 0 and found["SIGTERM"]["counts"]["answered"] > 0
