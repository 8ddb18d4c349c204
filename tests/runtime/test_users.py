"""The uses of a model of transformers: each works with an artifact too, or is refused in one sentence."""

import copy
import io
import pickle

import encoders
import pytest
import torch
import transformers
from families import SMALL, swapped
from forms import close, padded_tokens, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache
from user_case import KEEP, generate, run

import linearize_cli.runtime  # noqa: F401

SLOW = pytest.mark.slow


def save(model, folder) -> str:
    """Write the model with a tokenizer of words."""
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(SMALL["vocab_size"] - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


HEADED = {
    "AutoModel": "LlamaModel",
    "AutoModelForCausalLM": "LlamaForCausalLM",
    "AutoModelForSequenceClassification": "LlamaForSequenceClassification",
    "AutoModelForTokenClassification": "LlamaForTokenClassification",
}
OTHERS = ("AutoModelForQuestionAnswering", "AutoModelForImageTextToText", "AutoModelForMaskedLM")


@pytest.mark.parametrize("name", HEADED)
@KEEP
def test_auto_classes_load_the_body_with_their_head(name, keep, tmp_path):
    model, ids = swapped("llama", keep=keep), tokens()
    auto = getattr(transformers, name)
    loaded, info = auto.from_pretrained(save(model, tmp_path / "a"), output_loading_info=True)
    assert type(loaded).__name__ == f"Linearized{HEADED[name]}"
    assert not any("layers" in key for key in info["missing_keys"])
    with torch.no_grad():
        body = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(loaded.eval()(ids, output_hidden_states=True).hidden_states[-1], body)
        loaded.save_pretrained(tmp_path / "b")
        again = auto.from_pretrained(tmp_path / "b").eval()
        torch.testing.assert_close(again(ids)[0], loaded(ids)[0])
    assert type(auto.from_config(AutoConfig.from_pretrained(tmp_path / "a"))) is type(loaded)


@pytest.mark.parametrize("name", OTHERS)
def test_auto_classes_that_cannot_say_which_can(name, tmp_path):
    swapped("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a linearized LlamaForCausalLM: load it with AutoModelForCausalLM"):
        getattr(transformers, name).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("bert", "AutoModelForTokenClassification", None),
        ("bert-body", "AutoModelForTokenClassification", None),
        ("bert-body", "AutoModelForMaskedLM", "a linearized BertModel: load it with AutoModel"),
        ("t5", "AutoModel", None),
        (
            "t5",
            "AutoModelForTokenClassification",
            "does not match this linearized model: it has no transformer.dec",
        ),
    ],
)
def test_auto_classes_of_encoders(family, name, reason, tmp_path):
    model = encoders.swapped(family)
    model.save_pretrained(tmp_path)
    if reason:
        with pytest.raises(ValueError, match=reason):
            getattr(transformers, name).from_pretrained(tmp_path)
        return
    loaded = getattr(transformers, name).from_pretrained(tmp_path)
    ours = {k: v for k, v in model.state_dict().items() if "linear_attention" in k}
    theirs = {k: v for k, v in loaded.state_dict().items() if "linear_attention" in k}
    assert len(ours) == len(theirs) and all(map(torch.equal, ours.values(), theirs.values()))


def test_pipelines(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", said.append)
    folder = save(swapped("llama"), tmp_path)
    texts = transformers.pipeline("text-generation", model=folder)(
        ["w1 w2", "w3"], batch_size=2, max_new_tokens=3
    )
    assert len(texts) == 2
    for task in ("text-classification", "token-classification", "feature-extraction"):
        assert transformers.pipeline(task, model=folder)(["w1 w2"])
    assert not said


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved_bytes(model), weights_only=False),
    "data parallel": nn.DataParallel,
}


def saved_bytes(model) -> io.BytesIO:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("way", COPIES)
@KEEP
def test_copies(way, keep):
    model, ids = swapped("llama", keep=keep), tokens()
    assert torch.equal(run(COPIES[way](model), ids), run(model, ids))


@pytest.mark.parametrize("places", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
def test_device_maps(places, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = swapped("llama", keep=1), tokens()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        run(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places), ids), run(model, ids)
    )


@KEEP
def test_round_trips_in_shards_and_with_more_tokens(keep, tmp_path):
    model, ids = swapped("llama", keep=keep), tokens()
    expected = run(model, ids)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"), ids), expected)
    model.resize_token_embeddings(SMALL["vocab_size"] + 11)
    model.save_pretrained(tmp_path / "resized")
    again = run(AutoModelForCausalLM.from_pretrained(tmp_path / "resized"), ids)
    close(again[..., : SMALL["vocab_size"]], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@KEEP
def test_dtypes(dtype, keep):
    model, ids = swapped("llama", keep=keep), tokens()
    expected, other = run(model, ids), copy.deepcopy(model).to(dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(run(other, ids).float(), expected, atol=tolerance, rtol=0.0)
    assert generate(other, ids, new=4).shape[1] == ids.shape[1] + 4
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(ids).logits.float(), expected, atol=0.1, rtol=0.0)


CACHES = ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked", "offloaded", "quantized")


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("keep", [0, 2])
def test_every_cache_implementation(kind, keep):
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads caches from CUDA")
    if kind == "quantized":
        pytest.importorskip("optimum.quanto", reason="transformers quantises caches with optimum-quanto")
    model, (ids, mask) = swapped("llama", keep=keep), padded_tokens()
    options = {"cache_config": {"backend": "quanto", "q_group_size": 16}} if kind == "quantized" else {}
    made = generate(model, ids, mask, cache_implementation=kind, **options)
    if not (options and keep):  # keys and values of softmax layers are rounded
        assert torch.equal(made, generate(model, ids, mask))


DECODING = {
    "beams": dict(num_beams=3, num_return_sequences=2),
    "several": dict(do_sample=True, num_return_sequences=3),
    "guidance": dict(guidance_scale=1.5),
    "penalties": dict(repetition_penalty=1.2, no_repeat_ngram_size=2),
    "sampling beams": dict(do_sample=True, num_beams=2),
}


@pytest.mark.parametrize("kind", DECODING)
@KEEP
def test_ways_of_decoding_are_the_same_with_a_cache(kind, keep):
    model, ids, made = swapped("llama", keep=keep), tokens(), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(generate(model, ids, new=8, use_cache=use_cache, **DECODING[kind]))
    assert torch.equal(*made)


@KEEP
def test_a_prefill_in_chunks_and_the_scores_of_a_text(keep):
    model, ids = swapped("llama", keep=keep), tokens()
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, prefill_chunk_size=7), greedy)
    more = dict(output_logits=True, output_hidden_states=True, return_dict_in_generate=True)
    found = generate(model, ids, **more)
    assert torch.equal(found.sequences, greedy)
    close(torch.stack(found.logits, 1), run(model, greedy)[:, ids.shape[1] - 1 : -1])


@KEEP
@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(c, 80)])
def test_a_cache_goes_on(keep, make):
    """Two calls of generate on one cache, and copies of a prefix, are as one call."""
    model, ids = swapped("llama", keep=keep), tokens()
    whole, cache = generate(model, ids, new=12), make(model.config)
    part = generate(model, ids, new=5, past_key_values=cache)
    assert torch.equal(generate(model, part, new=7, past_key_values=cache), whole)
    prefix = make(model.config)
    run(model, ids[:, :10], past_key_values=prefix)
    for _ in range(2):
        again = generate(model, ids, new=12, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(again, whole)


@KEEP
def test_inputs_of_every_kind(keep):
    model, ids = swapped("llama", keep=keep), tokens()
    expected = run(model, ids)
    assert torch.equal(run(model, None, inputs_embeds=model.get_input_embeddings()(ids)), expected)
    assert torch.equal(run(model, ids, position_ids=torch.arange(ids.shape[1])[None]), expected)
    assert torch.equal(run(model, ids, logits_to_keep=3), expected[:, -3:])
    assert torch.equal(run(model, ids, attention_mask=torch.ones_like(ids).bool()), expected)
    close(run(model, ids[:, :1]), expected[:, :1])
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    seen = []
    hooks = [module.register_forward_hook(lambda *args: seen.append(1)) for module in model.modules()]
    assert torch.equal(run(model, ids), expected) and seen
    for hook in hooks:
        hook.remove()


@KEEP
def test_masks_longer_than_the_text(keep):
    """Check that a mask as long as a static cache is read up to its tokens only."""
    model, ids = swapped("llama", keep=keep), tokens()
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    expected = run(model, ids)
    close(run(model, ids, attention_mask=mask, use_cache=False), expected)
    cache, places = DynamicCache(config=model.config), torch.arange(ids.shape[1])[None]
    for part in (slice(0, 12), slice(12, None)):
        given = dict(attention_mask=mask, position_ids=places[:, part], past_key_values=cache)
        close(run(model, ids[:, part], **given), expected[:, part])
