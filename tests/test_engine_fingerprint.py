"""One name for one model, wherever its directory lies; another for every change of its weights or sizes."""

import shutil
import subprocess
import sys

import pytest

from engine.fingerprint import model_fingerprint, random_fingerprint, weight_files
from protos.errors import ModelUnusable
from tiny_model import make_tiny_model


def test_the_same_wherever_the_directory_lies(tmp_path):
    path = make_tiny_model(tmp_path / "a")
    shutil.copytree(path, tmp_path / "b" / "c")
    assert model_fingerprint(path) == model_fingerprint(tmp_path / "b" / "c")
    assert len(model_fingerprint(path)) == 32


def test_every_change_shows(tmp_path):
    options = [{}, {"seed": 1}, {"rope_theta": 5.0}, {"shards": 2}, {"tied": True}, {"ffn": 96}, {"rms_norm_eps": 1e-6}]
    fingerprints = {model_fingerprint(make_tiny_model(tmp_path / str(i), **o)) for i, o in enumerate(options)}
    assert len(fingerprints) == len(options)


def test_a_change_of_one_weight_of_a_small_model_shows(tmp_path):
    file = make_tiny_model(tmp_path) / "model.safetensors"
    before = model_fingerprint(tmp_path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert model_fingerprint(tmp_path) != before


def test_random_weights_are_named_by_config_and_seed(tmp_path):
    path = make_tiny_model(tmp_path / "a")
    (path / "model.safetensors").unlink()
    shutil.copytree(path, tmp_path / "b")
    assert random_fingerprint(path, 0) == random_fingerprint(tmp_path / "b", 0)
    assert random_fingerprint(path, 7).startswith("random-7-")
    others = [random_fingerprint(path, 1), random_fingerprint(make_tiny_model(tmp_path / "c", ffn=96), 0)]
    assert len({random_fingerprint(path, 0), *others}) == 3
    (path / "config.json").unlink()
    with pytest.raises(ModelUnusable, match=r"cannot be read .*: give a model's directory"):
        random_fingerprint(path, 0)


def test_it_needs_no_torch(tmp_path):
    path = make_tiny_model(tmp_path)
    code = (
        "import sys, pathlib; from engine import hub, tokenizer, model_config, detokenizer, stop_strings; "
        "from engine import sampling_params, fingerprint, byte_tokenizer; "
        f"print(fingerprint.model_fingerprint(pathlib.Path({str(path)!r}))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == model_fingerprint(path)


def test_weight_files(tmp_path):
    single = make_tiny_model(tmp_path / "1")
    assert weight_files(single) == [single / "model.safetensors"]
    sharded = make_tiny_model(tmp_path / "3", shards=3)
    assert [file.name for file in weight_files(sharded)] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "holds neither model.safetensors nor .*: give a model with safetensors weights"),
        ("{", "index.json cannot be read .*: fetch"),
        ("{}", "index.json names no files: fetch"),
        ('{"weight_map": []}', "index.json names no files: fetch"),
        (
            '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}',
            r"lacks x.safetensors, y.safetensors.*: fetch",
        ),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"lacks ../x.safetensors"),
    ],
    ids=str,
)
def test_missing_files(tmp_path, index, message):
    path = make_tiny_model(tmp_path)
    (path / "model.safetensors").unlink()
    if index is not None:
        (path / "model.safetensors.index.json").write_text(index)
    for call in (weight_files, model_fingerprint):
        with pytest.raises(ModelUnusable, match=message):
            call(path)


def test_without_config(tmp_path):
    (make_tiny_model(tmp_path) / "config.json").unlink()
    with pytest.raises(ModelUnusable, match=r"config.json.*fetch the model's files again"):
        model_fingerprint(tmp_path)
