"""convert on models of Hugging Face transformers, tiny and with random weights."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import lutra  # noqa: E402
from lutra.nn._compressed import Compressed  # noqa: E402

V = 300
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 32}


def _bert():
    config = transformers.BertConfig(vocab_size=V, max_position_embeddings=64, **SMALL)
    return transformers.BertForMaskedLM(config), transformers.AutoModelForMaskedLM


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config), transformers.AutoModelForCausalLM


def _llama(tied):
    config = transformers.LlamaConfig(vocab_size=V, tie_word_embeddings=tied, pad_token_id=0, **SMALL)
    return transformers.LlamaForCausalLM(config), transformers.AutoModelForCausalLM


def _neox():
    config = transformers.GPTNeoXConfig(vocab_size=V, tie_word_embeddings=False, **SMALL)
    return transformers.GPTNeoXForCausalLM(config), transformers.AutoModelForCausalLM


def _t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=32, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), transformers.AutoModelForSeq2SeqLM


def _bart():  # its embedding is a subclass that scales what torch's gives
    config = transformers.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        scale_embedding=True,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config), transformers.AutoModelForSeq2SeqLM


FAMILIES = {
    "bert": _bert, "gpt2": _gpt2, "llama_tied": lambda: _llama(True), "llama_untied": lambda: _llama(False),
    "neox": _neox, "t5": _t5, "bart": _bart,
}  # fmt: skip
TIED = {"bert", "gpt2", "llama_tied", "t5", "bart"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders with dense models."""
    transformers.logging.set_verbosity_error()
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
    made = {}

    def get(family, dtype=torch.float32):
        if family not in made:
            torch.manual_seed(0)
            model, auto = FAMILIES[family]()
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            made[family] = path, auto
        path, auto = made[family]
        return auto.from_pretrained(path, dtype=dtype).eval(), auto

    return get


IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(ids).logits


def stand_in(model, layer):
    """The dense model with the rows that the compressed layer gives."""
    model.get_input_embeddings().weight.data.copy_(layer.dense())
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_that_of_the_dense_model_with_the_decoded_rows(dense, family):
    model, _ = dense(family)
    report = lutra.compress.report(lutra.compress.convert(model, "low_rank", rank=8))
    assert len(report.tables) == 1 and report.after < report.before
    layer = model.get_input_embeddings()
    assert isinstance(layer, Compressed) and isinstance(layer, torch.nn.Embedding)
    assert isinstance(model.get_output_embeddings(), lutra.nn.TiedHead) == (family in TIED)
    expected = logits(stand_in(dense(family)[0], layer))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_and_checkpointing(dense, family):
    model, _ = dense(family)
    lutra.compress.convert(model, "low_rank", rank=8)
    logits(model).square().sum().backward()
    layer = model.get_input_embeddings()
    plain = layer.factor.grad.clone()
    assert plain.abs().sum() > 0 and layer.basis.grad.abs().sum() > 0
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits(model).square().sum().backward()
    assert layer.factor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "family, dtype",
    [*((f, torch.float32) for f in FAMILIES), *((f, torch.bfloat16) for f in ("bert", "llama_tied", "t5"))],
)
def test_save_and_load_give_the_same_bits(dense, family, dtype, tmp_path):
    model, auto = dense(family, dtype)
    lutra.compress.convert(model, "low_rank", rank=8)
    model.tie_weights()
    model.init_weights()
    before = logits(model)
    assert before.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded.eval()), before)
    assert loaded.get_input_embeddings().factor.requires_grad
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    one, two = load_file(tmp_path / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < dense(family, dtype)[0].num_parameters() * before.element_size()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other).__name__ == type(model).__name__
        assert torch.equal(logits(other), before)
        other.resize_token_embeddings(V + 1)
        assert logits(other).shape[-1] == V + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_resize_up_and_down_and_save(dense, family, tmp_path):
    model, auto = dense(family)
    lutra.compress.convert(model, "low_rank", rank=8)
    layer = model.get_input_embeddings()
    before, rows = logits(model), layer.dense()
    for n in (V + 17, V - 40):
        assert model.resize_token_embeddings(n) is layer
        assert model.config.vocab_size == n == layer.num_embeddings == len(layer.weight)
        kept = min(n, V)
        assert torch.equal(layer.dense()[:kept], rows[:kept])
        if n > V:  # the mean of the old rows, as transformers does
            new = layer.dense()[V:]
            torch.testing.assert_close(new, rows.mean(0).expand_as(new), rtol=0.1, atol=0.05)
        after = logits(model)
        assert after.shape[-1] == n
        torch.testing.assert_close(after[..., : V - 40], before[..., : V - 40])
        assert layer.factor.requires_grad
        model.save_pretrained(tmp_path / str(n))
        assert torch.equal(logits(auto.from_pretrained(tmp_path / str(n), dtype=torch.float32).eval()), after)
    model.resize_token_embeddings(V, pad_to_multiple_of=64, mean_resizing=False)
    assert layer.num_embeddings == 320 and logits(model).shape[-1] == 320


@pytest.mark.parametrize("family, dtype", [("llama_untied", torch.bfloat16), ("neox", torch.float32)])
def test_untied_heads(dense, family, dtype, tmp_path):
    """head='compressed': forward, tying, resizing, saving, budgets."""
    model, auto = dense(family, dtype)
    lutra.compress.convert(model, "int8")
    (reason,) = (v for k, v in lutra.compress.report(model).skipped.items() if "head" in k or "out" in k)
    assert "head='compressed'" in reason and type(model.get_output_embeddings()) is torch.nn.Linear
    model, like = dense(family, dtype)[0], dense(family, dtype)[0]
    lutra.compress.convert(model, "int8", head="compressed")
    head = model.get_output_embeddings()
    assert isinstance(head, lutra.nn.OutputHead) and len(lutra.compress.report(model).tables) == 2
    stand_in(like, model.get_input_embeddings())
    like.get_output_embeddings().weight.data.copy_(head.table.dense())
    share = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(model), logits(like), rtol=share, atol=share)
    model.tie_weights()
    model.init_weights()
    before = logits(model)
    torch.testing.assert_close(before, logits(like), rtol=share, atol=share)
    for n in (V + 17, V - 40):
        model.resize_token_embeddings(n)
        assert head is model.get_output_embeddings() and head.out_features == head.table.num_embeddings == n
        after = logits(model)
        torch.testing.assert_close(after[..., : V - 40], before[..., : V - 40])
        model.save_pretrained(tmp_path / str(n))
        loaded, info = auto.from_pretrained(tmp_path / str(n), dtype=dtype, output_loading_info=True)
        assert not any(info.values()), info
        assert isinstance(loaded.get_output_embeddings(), lutra.nn.OutputHead)
        assert torch.equal(logits(loaded.eval()), after)
    assert torch.equal(logits(copy.deepcopy(model)), after)
    assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape == (2, 14)


def test_untied_heads_share_a_budget(dense):
    model, _ = dense("llama_untied")
    ids = torch.randint(0, V, (4, 32))
    lutra.compress.convert(
        model, budget="60%", calibration=ids, head="compressed", formats=["int8", "int4", "low_rank"]
    )
    report = lutra.compress.report(model)
    assert {e.module for e in report.tables} == {"model.embed_tokens", "lm_head"}
    assert report.after <= 0.6 * report.before and all(e.divergence is not None for e in report.tables)


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "t5"])
def test_generate(dense, family):
    model, _ = dense(family)
    lutra.compress.convert(model, "low_rank", rank=8)
    like = stand_in(dense(family)[0], model.get_input_embeddings())
    args = {
        "max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0,
    }  # fmt: skip
    assert torch.equal(model.generate(IDS, **args), like.generate(IDS, **args))


def test_a_base_model_loads_what_a_task_model_saved(dense, tmp_path):
    model, _ = dense("bert")
    lutra.compress.convert(model, "low_rank", rank=8)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(IDS)[0], model.bert(IDS)[0])
    encoder = dense("t5")[0]
    lutra.compress.convert(encoder, "low_rank", rank=8)
    encoder.save_pretrained(tmp_path / "t5")
    part = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").eval()
    assert torch.equal(part(IDS)[0], encoder.encoder(IDS)[0])


def test_sharded_files(dense, tmp_path):
    model, auto = dense("gpt2")
    lutra.compress.convert(model, "low_rank", rank=8)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(auto.from_pretrained(tmp_path).eval()), logits(model))


def test_checkpoints_that_do_not_fit(dense, tmp_path):
    model, auto = dense("gpt2")
    lutra.compress.convert(model, "low_rank", rank=8)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, text = load_file(file), config.read_text()

    def refuses(message):
        with pytest.raises((ValueError, RuntimeError), match=message):
            auto.from_pretrained(tmp_path)

    save_file({k: v for k, v in tensors.items() if not k.endswith(".basis")}, file, {"format": "pt"})
    refuses(r"lacks transformer\.wte\.basis")
    save_file({**tensors, "transformer.wte.factor": tensors["transformer.wte.factor"][:, :4].clone()}, file,
              {"format": "pt"})  # fmt: skip
    refuses(r"transformer\.wte\.factor has shape \(300, 4\)|mismatch")  # what transformers 4 says
    save_file(tensors, file, {"format": "pt"})
    spec = json.loads(text)
    spec["quantization_config"]["tables"]["transformer.other"] = {"format": "low_rank", "rank": 8}
    config.write_text(json.dumps(spec))
    refuses("GPT2LMHeadModel has no such embedding")
    spec = json.loads(text)
    spec["quantization_config"]["tables"]["transformer.wte"] = {"format": "unheard_of"}
    config.write_text(json.dumps(spec))
    refuses("format must be one of")
    config.write_text(text)
    assert torch.equal(logits(auto.from_pretrained(tmp_path).eval()), logits(model))


def test_train_through_a_head_of_its_own(dense):
    model, _ = dense("gpt2")
    before = logits(model)
    lutra.compress.convert(model, "low_rank", rank=32, head="dense")
    assert isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.weight.shape == (V, 32)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


def test_budget_compares_predictions(dense):
    model, _ = dense("gpt2")
    ids = torch.randint(0, V, (4, 32))
    lutra.compress.convert(model, budget="40%", calibration=ids, formats=["low_rank"], progress=False)
    report = lutra.compress.report(model)
    assert report.after <= 0.4 * report.before and report.budget == int(0.4 * report.before)
    assert report.tables[0].divergence >= 0
    assert [e.chosen for e in report.tried] == [True]


def test_registered_though_imported_before_transformers():
    import subprocess
    import sys

    code = (
        "import lutra.compress, sys; assert not {'transformers', 'torch'} & set(sys.modules)\n"
        "from transformers.quantizers import auto; assert 'lutra' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
