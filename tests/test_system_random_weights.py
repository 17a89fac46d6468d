"""`load: random` through the whole path: a config.json alone is served, and both pools have made the same weights."""

import shutil

from engine import hub
from engine.config import EngineConfig
from engine.loader import load_model
from paged_sequences import Pages
from stack import Stack
from tiny_model import make_tiny_model

ANSWER = 24


def greedy(model, prompt):
    """The ids after the prompt, computed by one decoder alone."""
    pages, ids = Pages(model, 16), list(prompt)
    for _ in range(ANSWER):
        [logits] = pages.step([("only", ids[pages.lengths.get("only", 0) :])])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


async def test_a_config_alone_is_served(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "shape.json"
    shutil.copyfile(make_tiny_model(tmp_path / "tiny", architecture="qwen3") / "config.json", config)
    path = hub.resolve(str(config), print, "random").path
    prompt = list(b"What is the capital of France? It lies on a river.")
    wanted = greedy(load_model(path, "float32", "cpu", load="random").model, prompt)
    assert len(set(wanted)) > ANSWER // 4  # a model that says one thing for ever would show nothing
    engine = EngineConfig(page_size=16, num_pages=64, dtype="float32", load="random")
    async with Stack(path, engine=engine) as stack:
        ids: list[int] = []
        async for chunk in stack.client.generate(token_ids=prompt, ignore_eos=True, max_tokens=ANSWER):
            ids += chunk.token_ids
        assert ids == wanted
        fingerprints = {description.fingerprint for description in await stack.descriptions()}
        assert len(fingerprints) == 1
        assert fingerprints.pop().startswith("random-0-")
