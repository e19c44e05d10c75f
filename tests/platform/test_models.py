"""The maker of tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sglang_cpu_platform import models
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ["gqa", "mla"]
PAGE_TOKENS = 64
CONTEXT_TOKENS = 512


@pytest.fixture(scope="module", params=KINDS)
def model_directory(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    models.make_model(out, models.geometry_of(request.param, torch.float32))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_make_equal_files_and_others_do_not(tmp_path, kind):
    geometry = models.geometry_of(kind, torch.float32)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        models.make_model(tmp_path / name, geometry, seed)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "again", "other")
    }
    assert files["one"] == files["again"]
    assert files["one"]["model.safetensors"] != files["other"]["model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "dtype", "kv_bytes", "layers"),
    [
        ("gqa", torch.bfloat16, 16_384, 8),
        ("gqa", torch.float32, 2_048, 4),
        ("mla", torch.bfloat16, 4_096, 8),
        ("mla", torch.float32, 4_096, 4),
    ],
)
def test_the_default_geometry_has_the_documented_kv_bytes(kind, dtype, kv_bytes, layers):
    geometry = models.geometry_of(kind, dtype)
    assert (geometry.kv_bytes, geometry.layers) == (kv_bytes, layers)


def test_kv_bytes_set_the_number_of_layers():
    geometry = models.geometry_of("gqa", torch.bfloat16, kv_bytes=4_096)
    assert (geometry.kv_bytes, geometry.layers) == (4_096, 2)


@pytest.mark.parametrize("kv_bytes", [0, -2_048, 2_049])
def test_kv_bytes_that_no_number_of_layers_gives_are_refused(kv_bytes):
    with pytest.raises(ValueError, match="positive multiple of 2048"):
        models.geometry_of("gqa", torch.bfloat16, kv_bytes=kv_bytes)


def test_the_command_line_writes_a_model(tmp_path, capsys):
    models.main(["--kind", "gqa", "--dtype", "bfloat16", "--kv-bytes", "2048", "--out", str(tmp_path / "model")])
    assert "1 layers, 2048 bytes of KV per token" in capsys.readouterr().out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (1, "bfloat16")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_the_tokenizer_returns_any_text(model_directory):
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    text = "Grüße, 你好\n\x00\t 1 <x>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


class Generator:
    """Greedy generation with the model of a directory, 32 tokens for each prompt of a batch."""

    def __init__(self, directory):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")

    def __call__(self, prompts):
        output = self.model.generate(prompts, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        return output[:, prompts.shape[1] :].tolist()

    def last_logits(self, prompts):
        with torch.no_grad():
            return self.model(prompts, logits_to_keep=1).logits[:, -1]


@pytest.fixture(scope="module")
def generate(model_directory):
    return Generator(model_directory)


def random_tokens(count, seed):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.timeout(400)  # was 70 s on two cores shared with servers
def test_another_page_anywhere_in_the_context_changes_the_output(generate):
    prompts = random_tokens(CONTEXT_TOKENS, seed=0).repeat(9, 1)
    for row, page in enumerate(range(CONTEXT_TOKENS // PAGE_TOKENS), start=1):
        prompts[row, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = random_tokens(PAGE_TOKENS, seed=row)
    reference, *changed = generate(prompts)
    assert len(set(reference)) > 8  # it does not repeat itself whatever it reads
    assert [output != reference for output in changed] == [True] * 8


@pytest.mark.timeout(400)  # was 70 s on two cores shared with servers
def test_another_early_token_moves_the_logits_and_mostly_the_output(generate):
    prompts = random_tokens(CONTEXT_TOKENS, seed=0).repeat(9, 1)
    for row in range(1, 9):
        prompts[row, 16 * (row - 1)] ^= 1
    reference, *changed = generate.last_logits(prompts)
    # 2e-4 is the most that fp32 and fp64 were seen to differ by.
    assert all((logits - reference).abs().max() > 1e-2 for logits in changed)
    reference, *changed = generate(prompts)
    assert sum(output != reference for output in changed) >= 4
