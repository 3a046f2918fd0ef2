import json

import jax.numpy as jnp
import pytest

from mpjax.diagnostics import JsonLines, write_scalars


class TestJsonLines:
    def test_a_line_is_on_the_disk_before_the_next_is_written(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_text()))
        path = tmp_path / "new" / "metrics.jsonl"
        with JsonLines(path) as log:
            log.write_scalars(0, {"loss": 0.5})
            log.write_scalars(1, {"loss": jnp.float32(0.25), "skips_total": 2})
        assert synced == [path.read_text().splitlines(True)[0], path.read_text()]
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"step": 0, "loss": 0.5},
            {"step": 1, "loss": 0.25, "skips_total": 2},
        ]

    @pytest.mark.parametrize("left", ["", '{"step": 0}\n', '{"step": 0}\n{"step": 1, "lo', '{"step"'])
    def test_what_a_crash_has_cut_short_goes(self, left, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(left)
        with JsonLines(path) as log:
            log.write_scalars(7, {})
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == ([0, 7] if "\n" in left else [7])

    def test_json_that_every_parser_reads(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        with JsonLines(path) as log:
            log.write_scalars(0, {"a": float("nan"), "b": float("-inf"), "c": jnp.float32(jnp.inf)})
        refuse = lambda name: pytest.fail(f"{name} is not JSON")
        values = json.loads(path.read_text(), parse_constant=refuse)
        assert values == {"step": 0, "a": "nan", "b": "-inf", "c": "inf"}


@pytest.mark.parametrize("method", ["write_scalars", "add_scalar", "scalar"])
def test_each_kind_of_writer(method):
    calls = []
    writer = type("Writer", (), {method: staticmethod(lambda *args: calls.append(args))})()
    write_scalars(writer, 3, {"loss": 0.5, "loss_scale": 8.0})
    each = [("loss", 0.5, 3), ("loss_scale", 8.0, 3)]
    assert calls == ([(3, {"loss": 0.5, "loss_scale": 8.0})] if method == "write_scalars" else each)


def test_what_is_no_writer():
    with pytest.raises(TypeError, match="writer is a dict") as error:
        write_scalars({}, 0, {"loss": 0.5})
    assert "JsonLines" in str(error.value)
