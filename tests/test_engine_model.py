"""The decoder's logits are transformers', however a sequence is cut into chunks, packed and spread over pages."""

import random

import pytest
import torch

import oracle
from engine.batch import ForwardBatch
from engine.loader import load_model
from engine.tokenizer import Tokenizer
from kernels.attention import AttentionPlan
from paged_sequences import Pages, assert_close
from tiny_model import make_tiny_model

TEXT = (
    "The water cycle describes how water moves between the ocean, the air and the land. The sun heats the surface of "
    "the sea, and some of the water evaporates and rises into the atmosphere as water vapor. As the air rises it "
    "cools, and the vapor condenses into tiny drops that form clouds. When the drops grow large enough, they fall "
    "back to the ground as rain or snow. Some of this water flows into rivers and lakes and returns to the ocean. "
    "Some of it soaks into the soil, where plants take it up through their roots and release it again through their "
    "leaves. The rest seeps deeper into the ground and collects in layers of rock and sand, which are called "
    "aquifers. People drill wells to reach this water and use it for drinking, for washing and for farming.\n\n"
    "Plants need light, water and carbon dioxide to grow. In a process called photosynthesis, they use the energy of "
    "sunlight to turn water and carbon dioxide into sugar and oxygen. The sugar gives the plant energy and is used to"
    " build new cells. The oxygen is released into the air, and animals and people breathe it. Photosynthesis takes "
    "place mostly in the leaves, in small structures that contain a green pigment called chlorophyll. Because of this"
    " pigment, most leaves look green. In autumn, when the days become shorter and colder, many trees stop making "
    "chlorophyll, and the yellow and red colors of other pigments become visible before the leaves fall to the "
    "ground."
)


@pytest.fixture(scope="module")
def smollm(demo_model):
    return load_model(demo_model.path, "float32", "cpu").model


@pytest.fixture(scope="module")
def text_ids(demo_model):
    return Tokenizer.from_dir(demo_model.path).encode(TEXT)


@pytest.fixture(scope="module")
def text_logits(demo_model, text_ids):
    return oracle.logits(demo_model.path, text_ids)


def test_smollm_logits_in_one_chunk(smollm, text_ids, text_logits):
    [logits] = Pages(smollm, 16).run([text_ids], [len(text_ids)])
    assert_close(logits, text_logits, 5e-4)


def test_smollm_logits_packed_chunked_and_decoded(smollm, text_ids, text_logits, demo_model):
    """Three sequences beside each other, in chunks and single tokens mixed, over shuffled pages."""
    sequences = [text_ids[:150], text_ids[100:180], text_ids[:40]]
    ours = Pages(smollm, 16).run(sequences, [1, 1, 5, 17, 64])
    assert_close(ours[0], text_logits[:150], 5e-4)
    assert_close(ours[1], oracle.logits(demo_model.path, sequences[1]), 5e-4)
    assert_close(ours[2], text_logits[:40], 5e-4)


def test_smollm_perplexity(smollm, text_ids, text_logits):
    """7.8 on this text. With the rows of q and k left as GGUF has them it would be 70."""
    [logits] = Pages(smollm, 64).run([text_ids], [100])
    theirs = oracle.perplexity(text_logits, text_ids)
    assert oracle.perplexity(logits, text_ids) == pytest.approx(theirs, rel=0.005)
    assert theirs < 9


def test_smollm_greedy_answers(smollm, text_ids, demo_model):
    """Two answers at once, id by id."""
    prompts = {"long": text_ids[:90], "short": text_ids[150:170]}
    pages = Pages(smollm, 16)
    logits = pages.step(list(prompts.items()))
    answers = {name: [] for name in prompts}
    for _ in range(16):
        for name, row in zip(prompts, logits, strict=True):
            answers[name].append(int(row[-1].argmax()))
        logits = pages.step([(name, [answer[-1]]) for name, answer in answers.items()])
    for name, answer in answers.items():
        assert answer == oracle.greedy_choices(demo_model.path, prompts[name], answer)


def test_smollm_in_bfloat16(demo_model, text_ids, text_logits):
    model = load_model(demo_model.path, "bfloat16", "cpu").model
    assert model.dtype == torch.bfloat16
    [logits] = Pages(model, 64).run([text_ids], [100])
    theirs = oracle.perplexity(text_logits, text_ids)
    assert oracle.perplexity(logits, text_ids) == pytest.approx(theirs, rel=0.005)


def test_every_chunk_size_and_page_size_gives_the_same(tmp_path):
    model = load_model(make_tiny_model(tmp_path), "float32", "cpu").model
    ids = [random.Random(2).randrange(300) for _ in range(70)]
    [whole] = Pages(model, 64).run([ids], [70])
    for page_size in (1, 16, 64):
        for chunk in (1, 2, 15, 16, 17, 63, 64, 69):
            [logits] = Pages(model, page_size, pages=80).run([ids], [chunk])
            assert_close(logits, whole, 1e-4)


def test_only_the_wanted_rows_come_back(tmp_path):
    model = load_model(make_tiny_model(tmp_path), "float32", "cpu").model
    pages = Pages(model, 16)
    [whole] = pages.run([[5, 6, 7, 8]], [4])
    plan = AttentionPlan(
        page_table=torch.tensor([pages.tables[0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 4], dtype=torch.int32),
        context_lens=torch.tensor([4], dtype=torch.int32),
        num_decodes=0,
        page_size=16,
    )
    slots = pages.tables[0][0] * 16 + torch.arange(4)
    for rows in ([3], [2, 0], []):
        wanted = torch.tensor(rows, dtype=torch.int64)
        batch = ForwardBatch(torch.tensor([5, 6, 7, 8]), torch.arange(4), slots, wanted, plan)
        logits = model.forward(batch, pages.cache)
        assert logits.shape == (len(rows), model.config.vocab)
        torch.testing.assert_close(logits, whole[rows])
