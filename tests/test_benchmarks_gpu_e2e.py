"""The benchmark of the whole path, with a tiny model on the CPU: every figure is there, and every check holds."""

import pytest

from benchmarks.gpu_e2e import Run, Sizes, failures, settings
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def test_a_tiny_model_goes_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_STATE", str(tmp_path / "state"))
    model = make_tiny_model(tmp_path / "tiny")
    engine = {"page_size": 16, "num_pages": 256, "token_budget": 128, "max_sequences": 16}
    sizes = Sizes(
        answer=6, timed=(40, 90), repeats=2, answer_timed=8, streams=8, answer_streams=150, prompt_streams=20, clients=1
    )
    run = Run("tiny", settings(str(model), "auto", "cpu", **engine), sizes, (1, 16, 17, 70), 200)
    run()
    result = run.result
    assert failures(result) == []
    assert result["split_and_colocated"]["prompts_with_equal_tokens"] == 6
    assert [worker["device"] for worker in result["split_workers"]] == ["cpu", "cpu"]
    assert [request["pages"] for request in result["requests"]] == [3, 3, 6, 6]
    assert result["many"]["router_cpu_us_per_token"] > 0
