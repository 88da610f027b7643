"""lutra.models.extended_mind: memories for decoders of transformers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mind = pytest.importorskip("lutra.models.extended_mind")

ids = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(0))
prompt = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(1))


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **options,
        }
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def generate(model, **options):
    return model.generate(
        prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_all_memories_of_one_window_are_the_document_itself(make):
    model = make()
    memories = mind.collect_memories(model, ids, window=40, positions="own", metric="ip")
    assert len(memories) == 40 and sorted(memories.banks) == [0, 1]
    whole = torch.cat([ids.expand(2, -1), prompt], 1)
    with torch.no_grad():
        want = model(whole).logits[:, 40:]
        plain = model(prompt).logits
        with mind.attach_memories(model, memories, top_k=40, similarity_threshold=None):
            got = model(prompt, position_ids=torch.arange(40, 46).expand(2, -1)).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(want, plain, atol=0.1)
        assert torch.equal(model(prompt).logits, plain)


def test_keys_without_rotation_and_windows():
    model = llama()
    seen = {}

    def keep(module, args, out):
        seen.setdefault("k", []).append(out.detach())

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(keep)
    memories = mind.collect_memories(model, ids, window=16, stride=6, layers=[1])
    hook.remove()
    assert list(memories.banks) == [1] and memories.banks[1].keys.shape == (2, 40, 8)
    assert [len(k[0]) for k in seen["k"]] == [16] * 5
    want = torch.cat([seen["k"][0][0]] + [k[0, -6:] for k in seen["k"][1:]])
    want = want.unflatten(-1, (2, 8)).transpose(0, 1)
    torch.testing.assert_close(memories.banks[1].keys, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memories.token_ids, ids) and torch.equal(memories.positions, torch.arange(40))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generating_and_citing(make):
    model = make()
    plain = generate(model)
    memories = mind.collect_memories(model, ids, window=16)
    with mind.attach_memories(model, memories, top_k=4, similarity_threshold=None) as attached:
        with attached.citing() as cited:
            first = generate(model)
        assert torch.equal(generate(model, use_cache=False), first)  # the cache changes nothing
        assert torch.equal(generate(model), first)
        with attached.citing(last_only=False) as all_of_it:
            model(prompt)
    assert torch.equal(generate(model), plain)
    # 4 tokens of 2 sequences, 4 heads, 2 layers
    assert cited.total == 64 and 0 < cited.share < 1
    assert all_of_it.total == 2 * 6 * 4 * 2
    top = cited.top(5)
    weights = [c.weight for c in top]
    assert weights == sorted(weights, reverse=True) and sum(weights) <= 64
    assert all(c.token_id == ids[c.position] and c.memory == c.position and c.document == 0 for c in top)
    torch.testing.assert_close(cited.weights.sum().item() / 64, cited.share)


def test_a_memory_that_is_looked_for_is_cited():
    model = llama()
    memories = mind.collect_memories(model, ids, window=40)
    bank = memories.banks[0]
    with torch.no_grad():  # one key that every query of the layer is nearest to
        bank.keys.mul_(0.01)
        keep = model.model.layers[0].self_attn.q_proj.weight
        keep.zero_()
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: torch.ones_like(out) * 3)
    with torch.no_grad():
        bank.keys[:, 17] = 5.0
    del seen
    only = mind.Memories({0: bank})
    only.token_ids, only.documents, only.positions = (
        memories.token_ids,
        memories.documents,
        memories.positions,
    )
    with mind.attach_memories(model, only, top_k=2) as attached, attached.citing() as cited:
        model(prompt[:, :1])
    assert cited.top(1)[0].memory == 17 and cited.share > 0.9


def test_padding_and_half():
    model = llama().to(torch.bfloat16)
    memories = mind.collect_memories(model, ids, window=16)
    assert memories.banks[0].dtype == torch.bfloat16
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(prompt)], 1)
    with mind.attach_memories(model, memories, top_k=4), torch.no_grad():
        want = model(prompt).logits[:, -1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.2)


def test_files_and_more_documents(tmp_path):
    model = llama()
    memories = mind.collect_memories(model, torch.stack([ids[:20], ids[20:]]), window=16)
    mind.collect_memories(model, ids.tolist()[:10], window=16, into=memories)
    assert len(memories) == 50 and memories.documents.unique().tolist() == [0, 1, 2]
    assert "50 tokens of 3 documents" in repr(memories) and memories.nbytes > 0
    path = tmp_path / "memories.safetensors"
    memories.save(path)
    with torch.no_grad():
        with mind.attach_memories(model, memories, top_k=4):
            want = model(prompt).logits
        for mmap in (True, False):
            again = mind.Memories.load(path, mmap=mmap)
            assert torch.equal(again.documents, memories.documents)
            with mind.attach_memories(model, again, top_k=4):
                assert torch.equal(model(prompt).logits, want)
    with pytest.raises(ValueError, match="not a MemoryBank"):
        lutra_nn = pytest.importorskip("lutra.nn")
        lutra_nn.MemoryBank.load(path)
    memories.banks[0].save(path)
    with pytest.raises(ValueError, match="not Memories"):
        mind.Memories.load(path)


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mind.collect_memories(model, ids, window=16)
    broken.remove()
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert not any("_lutra_memory" in m.__dict__ for m in model.modules())
    memories = mind.collect_memories(model, ids, window=16)
    attached = mind.attach_memories(model, memories)
    with pytest.raises(ValueError, match="already"):
        mind.attach_memories(model, memories)
    more = mind.collect_memories(model, ids, window=16)  # those attached take no part
    assert torch.equal(more.banks[1].keys, memories.banks[1].keys)
    assert model.config._attn_implementation == "lutra_memory"
    attached.detach()
    attached.detach()
    assert model.config._attn_implementation == "sdpa"


def test_gradients_reach_the_model():
    model = llama().train()
    memories = mind.collect_memories(model, ids, window=16)
    with mind.attach_memories(model, memories, top_k=4):
        model(prompt, labels=prompt).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_input():
    model = llama()
    with pytest.raises(TypeError, match="input_ids must be integers"):
        mind.collect_memories(model, torch.zeros(3))
    with pytest.raises(TypeError, match="model of transformers"):
        mind.collect_memories(torch.nn.Linear(2, 2), ids)
    with pytest.raises(ValueError, match="no tokens"):
        mind.collect_memories(model, torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="window"):
        mind.collect_memories(model, ids, window=1000)
    with pytest.raises(ValueError, match="layers are"):
        mind.collect_memories(model, ids, layers=[7])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    memories = mind.collect_memories(model, ids, layers=[0])
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        mind.collect_memories(model, ids)
    for other in (gpt2(), llama(num_attention_heads=2), llama(num_attention_heads=8)):
        if getattr(other.config, "num_attention_heads", 0) == 4 and other.config.model_type == "gpt2":
            continue  # the same heads: nothing tells these memories from its own
        with pytest.raises(ValueError, match="of another model"):
            mind.attach_memories(other, memories)
    with pytest.raises(ValueError, match="the model has"):
        mind.attach_memories(llama(num_hidden_layers=1), mind.Memories({3: memories.banks[0]}))
    with pytest.raises(TypeError, match="must be Memories"):
        mind.attach_memories(model, memories.banks[0])


def test_the_examples_of_the_documentation(tmp_path, monkeypatch, capsys):
    import re
    from pathlib import Path

    page = Path(__file__).resolve().parents[1] / "docs" / "memory-attention.md"
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert names["out"].shape == (1, 8, 16, 64) and names["seen"].ids.shape == (1, 8, 16, 10)
    assert "of all attention went to memories" in capsys.readouterr().out
    assert (tmp_path / "memories.safetensors").exists() and (tmp_path / "triggers.safetensors").exists()
    assert names["table"].row_count == 6
