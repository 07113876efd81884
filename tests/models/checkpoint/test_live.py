"""Live models of transformers: their own ``generate`` is the judge, for every architecture, token for token."""

import copy
import types
import warnings
from pathlib import Path

import pytest
import torch
from test_huggingface import CASES, theirs
from torch import nn

import turnout
from turnout.errors import UsageError
from turnout.models import LM, checkpoint

LENGTHS = (4, 17, 11)
# In transformers a batch of these has the frequencies of its longest row as it is padded: tests/.../test_longrope.py.
LONG = {"phi3 long"}


def prompts(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in LENGTHS]


def beside(texts: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers takes: one matrix, padded on the left, and its mask."""
    width = max(map(len, texts))
    id_BS = torch.stack([nn.functional.pad(text, (width - len(text), 0), value=pad) for text in texts])
    mask_BS = torch.stack([nn.functional.pad(torch.ones_like(text), (width - len(text), 0)) for text in texts])
    return id_BS, mask_BS


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_generates_as_transformers_does(name: str) -> None:
    """Unequal prompts, ends, a penalty: every token, and every padding after an end."""
    hf = theirs(name)
    texts = prompts(hf.config.vocab_size)
    id_BS, mask_BS = beside(texts, pad=5)
    ask = {"attention_mask": mask_BS, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 5}
    plain = hf.generate(id_BS, **ask, eos_token_id=None)
    lm = checkpoint.from_live(hf)
    made = turnout.generate(lm, texts, tokens=12, temperature=0, pad=5, eos=None)
    assert made.id_BT.tolist() == plain.tolist()
    ends = sorted({int(plain[0, 17 + 3]), int(plain[2, 17 + 7])})
    for penalty, eos in ((1.0, ends), (1.4, None), (0.8, ends)):
        want = hf.generate(id_BS, **ask, eos_token_id=eos, repetition_penalty=penalty)
        got = turnout.generate(lm, texts, tokens=12, temperature=0, pad=5, eos=eos, repetition_penalty=penalty)
        assert got.id_BT.tolist() == want.tolist(), (penalty, eos)
        for row, why in zip(got.rows, got.why_B, strict=True):
            assert (row[-1] in ends) == (why == "eos") if eos else (why == "tokens" and len(row) == 12)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_what_is_made_of_a_live_model_computes_what_it_does(name: str) -> None:
    hf, id_BS = theirs(name), torch.arange(3, 63).reshape(3, 20)
    lm = checkpoint.from_live(hf)
    torch.testing.assert_close(lm(id_BS).logits_BSV, hf(id_BS).logits, rtol=0, atol=1e-4)
    assert not lm.training and not any(one.requires_grad for one in lm.parameters())
    assert not any(tensor.is_meta for tensor in (*lm.parameters(), *lm.buffers()))
    # As it would have been read from a folder, to the bit.
    hf.double()
    assert checkpoint.from_live(hf).embedding.dtype == torch.float64


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "llama tied, llama3 rope", "olmoe"])
def test_what_lies_the_same_way_is_shared(name: str) -> None:
    hf = theirs(name)
    before = {parameter.data_ptr() for parameter in hf.parameters()}
    state = {key: value.clone() for key, value in hf.state_dict().items()}
    lm = checkpoint.from_live(hf)
    shared = [name for name, parameter in lm.named_parameters() if parameter.data_ptr() in before]
    assert {"embedding", "norm.weight", "blocks.0.attention.out.weight"} <= set(shared)
    copied = {name.rpartition(".attention.")[2] for name in set(dict(lm.named_parameters())) - set(shared)}
    if lm.config.moe is not None and not lm.config.moe.shared_hidden and lm.config.moe.layers is None:
        assert copied == {"qkv.weight"}
    assert before == {parameter.data_ptr() for parameter in hf.parameters()}
    assert all(torch.equal(value, state[key]) for key, value in hf.state_dict().items())
    assert all(parameter.requires_grad for parameter in hf.parameters())


def test_a_model_of_transformers_generates_by_itself() -> None:
    hf = theirs("qwen3_moe").train()
    hf.generation_config.eos_token_id, texts = None, prompts(67)
    want = turnout.generate(checkpoint.from_live(hf), texts, tokens=9, temperature=0).rows
    assert turnout.generate(hf, texts, tokens=9, temperature=0).rows == want and hf.training
    hf.generation_config.eos_token_id = [want[1][4], want[0][6]]
    made = turnout.generate(hf, texts, tokens=9, temperature=0)
    assert made.why_B[1] == "eos" and made.rows[1] == want[1][: want[1].index(want[1][4]) + 1]
    # An LM that was made of it knows, too.
    assert turnout.generate(checkpoint.from_live(hf), texts, tokens=9, temperature=0).rows == made.rows
    assert turnout.generate(hf, texts, tokens=9, temperature=0, eos=None).rows == want


def adopted() -> nn.Module:
    return turnout.adopt(theirs("mixtral"))[0]


def test_an_adopted_model_is_no_other() -> None:
    texts = prompts(67)
    want = turnout.generate(theirs("mixtral"), texts, tokens=6, temperature=0, eos=None).rows
    assert turnout.generate(adopted(), texts, tokens=6, temperature=0, eos=None).rows == want


class Other(nn.Linear):
    """A layer of the user's own."""


def spoilt(how: str) -> nn.Module:
    hf = theirs("llama")
    layer = hf.model.layers[1]
    if how == "class":
        layer.mlp.down_proj = Other(40, 32, bias=False)
    elif how == "forward":
        layer.mlp.forward = types.MethodType(lambda self, x: x, layer.mlp)
    elif how == "hook":
        layer.register_forward_hook(lambda module, given, out: out)
    elif how == "dtypes":
        layer.mlp.down_proj.to(torch.bfloat16)
    elif how == "integers":
        for parameter in hf.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.int8)
    elif how == "more":
        layer.mlp.more = nn.Linear(2, 2)
    elif how == "parameter":
        layer.mlp.more = nn.Parameter(torch.ones(2))
    elif how == "shape":
        layer.mlp.down_proj.weight = nn.Parameter(torch.ones(30, 40))
    elif how == "activation":
        hf.config.hidden_act = "tanh"
    elif how == "another activation":
        layer.mlp.act_fn = nn.ReLU()
    elif how == "a setting":
        layer.input_layernorm.variance_epsilon = 0.5
    elif how == "the configuration":
        hf.config.rms_norm_eps = 0.5
    elif how == "a base of RoPE":
        hf.config.rope_parameters["rope_theta"] = 3.0
    elif how == "angles":
        hf.model.rotary_emb.inv_freq.mul_(0.5)
    elif how == "a scale":
        hf = theirs("gemma")
        hf.model.embed_tokens.embed_scale.mul_(0.5)
    elif how == "a head":
        hf = theirs("llama tied, llama3 rope")
        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach() * 2)
    elif how == "meta":
        hf.to("meta")
    elif how == "subclass":
        hf.__class__ = type("LlamaForCausalLM", (type(hf),), {"__module__": "mine"})
    return hf


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("class", r"model\.layers\.1\.mlp\.down_proj, a Other of .*test_live"),
        ("forward", r"model\.layers\.1\.mlp, whose forward was replaced"),
        ("hook", r"model\.layers\.1, which has hooks"),
        ("dtypes", r"weights of .*bfloat16 \(model\.layers\.1\.mlp\.down_proj\.weight\)"),
        ("integers", r"weights of int8 \(.*no quantisation"),
        ("more", r"model\.layers\.1\.mlp\.more, a Linear of torch"),
        ("parameter", r"model\.layers\.1\.mlp\.more is \(2,\), not there"),
        ("shape", r"down_proj\.weight is \(30, 40\), not \(32, 40\)"),
        ("activation", r"hidden_act"),
        ("another activation", r"model\.layers\.1\.mlp\.act_fn, a ReLU of torch.*, where its configuration has a SiLU"),
        ("a setting", r"model\.layers\.1\.input_layernorm, whose variance_epsilon is 0\.5, not 0\.03"),
        ("the configuration", r"whose variance_epsilon is 0\.03, not 0\.5"),
        ("a base of RoPE", r"model\.rotary_emb, whose inv_freq is not what its configuration makes it"),
        ("angles", r"model\.rotary_emb, whose inv_freq is not"),
        ("a scale", r"model\.embed_tokens, whose embed_scale is not"),
        ("a head", r"an lm_head\.weight of its own.*tie_word_embeddings = False"),
        ("meta", r"weights on meta"),
        ("subclass", r"a LlamaForCausalLM of mine"),
    ],
)
def test_what_is_not_what_it_seems_is_refused(how: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        turnout.generate(spoilt(how), [[3, 4]], tokens=2)
    assert "Nearest fix: " in str(caught.value) and "from_live" in str(caught.value)


def test_other_architectures_and_adapters_are_told_apart() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=67, max_position_embeddings=64, **sizes))
    with pytest.raises(UsageError, match=r"be one of DeepseekV2ForCausalLM, .*fallback=True"):
        turnout.generate(neox, [[3, 4]], tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(theirs("llama"), LoraConfig(target_modules=["q_proj"]))
        named = get_peft_model(theirs("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for one in (peft, named):
        with pytest.raises(UsageError, match=r"first: model\.merge_and_unload\(\)"):
            turnout.generate(one, [[3, 4]], tokens=2)
    merged = peft.merge_and_unload()
    assert isinstance(checkpoint.from_live(merged), LM)
    with pytest.raises(UsageError, match="a Linear of torch"):
        checkpoint.from_live(nn.Linear(2, 2))


@pytest.mark.parametrize("how", ["neox", "hook"])
def test_what_is_no_lm_runs_as_it_is_when_asked(how: str) -> None:
    """Every setting works there too, and the texts are transformers' own."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    hf, texts = spoilt("hook").eval(), prompts(67)
    if how == "neox":
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = GPTNeoXConfig(vocab_size=67, max_position_embeddings=64, initializer_range=0.3, **sizes)
        hf = GPTNeoXForCausalLM(config).eval()
    id_BS, mask_BS = beside(texts, pad=5)
    ask = {"attention_mask": mask_BS, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 5}
    plain = hf.generate(id_BS, **ask, eos_token_id=None, repetition_penalty=1.2)
    ends = [int(plain[1, 17 + 3])]
    want = hf.generate(id_BS, **ask, eos_token_id=ends, repetition_penalty=1.2)
    with pytest.warns(UserWarning, match=r"runs the model as it is, with transformers: hf_model must"):
        got = turnout.generate(
            hf, texts, tokens=10, temperature=0, eos=ends, repetition_penalty=1.2, pad=5, fallback=True
        )
    assert got.id_BT.tolist() == want.tolist() and got.why_B[1] == "eos"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = [
            turnout.generate(hf, some, tokens=6, seed=3, fallback=True, eos=None).rows for some in (texts, texts[1:2])
        ]
    assert drawn[0][1] == drawn[1][0]


def test_changes_show_after_making_it_anew() -> None:
    hf, id_BS = theirs("qwen2_moe"), torch.arange(3, 13)[None]
    lm = checkpoint.from_live(hf)
    again = copy.deepcopy(hf)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.05)
        torch.testing.assert_close(checkpoint.from_live(hf)(id_BS).logits_BSV, hf(id_BS).logits, rtol=0, atol=1e-4)
        assert not torch.equal(lm(id_BS).logits_BSV, again(id_BS).logits)  # experts are the model's own


def test_a_head_of_its_own_is_taken_once_that_is_said() -> None:
    hf, id_BS = spoilt("a head"), torch.arange(3, 13)[None]
    hf.config.tie_word_embeddings = False
    torch.testing.assert_close(checkpoint.from_live(hf)(id_BS).logits_BSV, hf(id_BS).logits, rtol=0, atol=1e-4)


def test_angles_that_were_rounded_with_the_weights_are_said() -> None:
    hf = theirs("llama").to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"inv_freq was rounded to bfloat16 .*from_pretrained"):
        lm = checkpoint.from_live(hf)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)  # as from_pretrained(..., dtype=torch.bfloat16) has it
    torch.testing.assert_close(lm.rope.frequency_P, checkpoint.from_live(hf).rope.frequency_P, rtol=0, atol=0)


STRANGERS = {
    "mamba": "keep a cache of keys and values",
    "bert": "keep a cache of keys and values",
    "prompt tuning": "read a text and what follows it as they are",
    "minimax": "one length, because it keeps a MiniMaxCache",
}


def stranger(name: str) -> nn.Module:
    import transformers as hf

    sizes = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if name == "mamba":
        return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1, state_size=4))
    if name == "bert":  # sees what follows, unless its configuration says that it is a decoder
        return hf.BertLMHeadModel(hf.BertConfig(intermediate_size=16, **sizes))
    if name == "minimax":
        kinds = {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2, "head_dim": 8}
        return hf.MiniMaxForCausalLM(hf.MiniMaxConfig(intermediate_size=16, num_local_experts=2, **sizes, **kinds))
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(theirs("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("name", STRANGERS)
def test_what_cannot_go_on_step_by_step_is_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = stranger(name).eval()
        with pytest.raises(UsageError, match=STRANGERS[name]):
            turnout.generate(hf, [[3, 4, 5], [6]], tokens=3, temperature=0, fallback=True)
        if name == "minimax":
            made = turnout.generate(hf, [[3, 4], [6, 7]], tokens=3, temperature=0, fallback=True)
            ask = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert made.id_BT.tolist() == hf.generate(torch.tensor([[3, 4], [6, 7]]), **ask).tolist()


@pytest.mark.parametrize(
    ("asks", "passed", "said"),
    [
        (
            {"repetition_penalty": 1.5},
            {},
            r"does not do repetition_penalty=1\.5, .* fix: pass repetition_penalty=1\.5\.",
        ),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.2}, None),
        (
            {"bad_words_ids": [[3]], "no_repeat_ngram_size": 2},
            {},
            r"no_repeat_ngram_size=2 and bad_words_ids=\[\[3\]\]",
        ),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, None),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 1},
            r"pass temperature=0\.6, top_p=0\.9",
        ),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.7}, None),
        ({"do_sample": True, "min_length": 0, "num_beams": 1, "top_k": 0, "typical_p": 1.0}, {"temperature": 1}, None),
    ],
)
def test_what_the_generation_configuration_asks_for_is_not_passed_over(
    asks: dict, passed: dict, said: str | None, tmp_path: Path
) -> None:
    """Of a live model, of the LM made of it, and of one read from its folder."""
    from transformers import GenerationConfig

    hf, ask = theirs("llama"), {"tokens": 2, "eos": None, "temperature": 0} | passed
    hf.generation_config = GenerationConfig(eos_token_id=[2, 900], **asks)  # 900 is no token, and is never drawn
    hf.save_pretrained(tmp_path)
    for model in (hf, checkpoint.from_live(hf), checkpoint.from_hf(tmp_path)):
        with warnings.catch_warnings() if said is None else pytest.warns(UserWarning, match=said):
            turnout.generate(model, [[3, 4]], **ask)
            turnout.generate(model, [[3, 4]], **ask | {"eos": "model"})
