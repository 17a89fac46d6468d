"""A folder named `kernels` at the root of sys.path disturbs nobody."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRANSFORMERS = """
import sys
sys.path.insert(0, {root!r})
import kernels
import torch
import transformers
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
assert kernels.__file__.startswith({root!r})
assert not is_kernels_available()
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
)
model = transformers.LlamaForCausalLM(config)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)
"""

WITHOUT_TRITON = """
import sys
sys.path.insert(0, {root!r})
import kernels
assert not {{"torch", "triton"}} & set(sys.modules)
sys.modules["triton"] = None  # importing it fails, as where there is no build of it
import torch
from kernels.attention import AttentionPlan, paged_attention
from kernels.embedding import embedding
from kernels.linear import linear, prepare_weight
from kernels.page_copy import page_gather
from kernels.page_write import page_write
from kernels.qkv_to_pages import qkv_to_pages
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.silu_mul import silu_mul
cache = torch.zeros(2, 1, 2, 1, 16, 8)
x = linear(silu_mul(rms_norm(torch.ones(2, 16), torch.ones(16), 1e-5)), prepare_weight(torch.ones(8, 8))).view(2, 1, 8)
cos, sin = rope_tables(torch.ones(4), 2)
q, k = rope(x, x, cos, sin)
page_write(k, k, cache, 0, torch.tensor([16, 17]))
q = qkv_to_pages(x.expand(2, 3, 8), cos, sin, None, None, 1e-5, cache, 0, torch.tensor([16, 17]))
assert embedding(torch.tensor([1]), torch.ones(2, 4), torch.float32).all()
plan = AttentionPlan(*(torch.tensor(v, dtype=torch.int32) for v in ([[1]], [0, 2], [2])), 0, 16)
assert paged_attention(q, cache, 0, plan).isfinite().all()
assert page_gather(cache, torch.tensor([1])).any()
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script.format(root=str(ROOT))],
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_transformers_beside_our_kernels():
    run(TRANSFORMERS)


def test_a_machine_without_triton_serves_on_its_cpu():
    run(WITHOUT_TRITON)
